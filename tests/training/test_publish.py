"""Publishing a run: once however often it is asked, of its own data, and never what has diverged."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from training import checkpoint, registry
from training.bundle_manifest import verify_bundle
from training.data.build import build
from training.data.config import BuildConfig
from training.data.dataset import Dataset


class Finished:
    """A tiny run that has ended, on a data set of its own, and what publishing it tells."""

    def __init__(self, runs: Any, folder: Path, mlflow_uri: str, name: str) -> None:
        self.runs, self.name, self.uri = runs, name, mlflow_uri
        self.data = folder / "data"
        shutil.copytree(runs.data, self.data)
        self.config = runs.config(name=name, data={"path": str(self.data)}, steps=2)
        self.run_dir = folder / name
        spec = {"config": self.config, "run_dir": str(self.run_dir), "rank": 0, "local_rank": 0, "world": 1}
        spec |= {"address": "127.0.0.1", "port": 0, "tracking_uri": mlflow_uri, "tags": {}, "parent_run_id": None}
        self.run_dir.mkdir()
        trained = runs.launch("train", spec, folder / "train.log")
        assert trained.end() == 0

    def publish(self, log: str, images: int = 8) -> Any:
        spec = {"config": self.config, "run_dir": str(self.run_dir), "tracking_uri": self.uri, "images": images}
        launched = self.runs.launch("publish", spec, self.run_dir / log)
        launched.code = launched.end()
        return launched


@pytest.fixture
def finished(runs: Any, tmp_path: Path, mlflow_uri: str) -> Finished:
    return Finished(runs, tmp_path, mlflow_uri, f"published-{tmp_path.name}"[:60])


def damage_captions(data: Path) -> None:
    """Of one picture in each split, as a disk may after the run has ended."""
    for name in ("train", "held_out"):
        record = Dataset.open(data).split(name).records[0]
        with (data / f"{name}-000000.tar").open("r+b") as file:
            file.seek(int(record["json_offset"]))
            file.write(b"?" * int(record["json_size"]))


def test_a_checkpoint_is_published_once(finished: Finished) -> None:
    damage_captions(finished.data)
    first = finished.publish("first.log")
    assert first.code == 0, first.log.read_text()[-3000:]
    (told,) = first.told("published")
    assert set(told["metrics"]) == {
        "held_out_loss",
        *(f"kid_{split}{what}" for split in ("held_out", "train") for what in ("", "_std", "_images")),
    }
    found, _ = checkpoint.newest(finished.run_dir / "checkpoints")
    assert found is not None
    assert len(found.about["use"]["digest"]) == 32
    assert verify_bundle(finished.run_dir / "bundle").provenance.use_digest == found.about["use"]["digest"]
    # a command that was killed after the registration has kept no record of it, and perhaps not the bundle either
    shutil.rmtree(finished.run_dir / "bundle")
    (again,) = finished.publish("again.log").told("published")
    assert {**again, "label": ""} == {**told, "label": ""}
    assert len(registry.versions(finished.uri, finished.name)) == 1
    assert not (finished.run_dir / "bundle").exists(), "nothing is measured again"
    (other,) = finished.publish("other.log", images=12).told("published")
    assert other["version"] == told["version"] + 1, "measured otherwise, it is another version"


def test_what_does_not_belong_together_is_refused(finished: Finished) -> None:
    found, _ = checkpoint.newest(finished.run_dir / "checkpoints")
    assert found is not None
    groups = {name: found.load(name) for name in found.source().groups()}
    name = sorted(groups["ema"])[0]
    groups["ema"][name] = torch.full_like(groups["ema"][name], float("nan"))
    kept = {"step": found.step, "position": found.position, "about": found.about}
    checkpoint.save(finished.run_dir / "checkpoints", groups=groups, **kept)
    diverged = finished.publish("diverged.log")
    assert diverged.code == 1
    (error,) = diverged.told("error")
    assert error["typed"]
    assert "averaged weights have diverged" in error["message"]
    assert name in error["message"]

    # the same place, other pictures: what was trained is not what would be measured
    shutil.rmtree(finished.data)
    source = finished.run_dir / "pictures"
    source.mkdir()
    for number in range(12):
        Image.effect_noise((16, 16), 20 + 9 * number).save(source / f"{number}.png")
    build(source, finished.data, BuildConfig(held_out=0.3))
    mixed = finished.publish("mixed.log")
    assert mixed.code == 1
    (error,) = mixed.told("error")
    assert "another data set" in error["message"]
    assert Dataset.open(finished.data).hash in error["message"]
    assert not registry.find(finished.uri, finished.name, "x")
