"""What the stages take for done already: of this recipe, these pictures, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from cluster import pipeline, winner
from cluster.stack import Stack
from training import checkpoint
from training.conditioning_config import TextConfig
from training.config import TrainConfig, parse
from training.data.build import BuildConfig, build
from training.errors import CheckpointError

SEARCHED = ("optimizer.learning_rate",)
HELD_OUT = BuildConfig(held_out=0.2)


@pytest.fixture
def place(tmp_path: Path) -> pipeline.Place:
    stack = Stack(tmp_path, "127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:3", 4, None)
    return pipeline.Place(stack, tmp_path / "runs")


@pytest.fixture
def config(tmp_path: Path, pictures: Path) -> TrainConfig:
    build(pictures, tmp_path / "data", HELD_OUT)
    return parse({"name": "cats", "steps": 6, "data": {"path": str(tmp_path / "data")}})


def train(place: pipeline.Place, config: TrainConfig, step: int = 6) -> None:
    """Leave behind what a training leaves."""
    about = {"config": config.model_dump(mode="json"), "data_hash": pipeline.data_hash(config)}
    folder = place.run_dir(config.name)
    groups = {"weights": {"w": torch.zeros(1)}}
    checkpoint.save(folder / "checkpoints", step=step, position=0, groups=groups, about=about)
    (folder / "mlflow_run.json").write_text(json.dumps({"run_id": "abc"}))


def repaint(config: TrainConfig, pictures: Path) -> None:
    """Other pictures, built into the same folder."""
    Image.new("RGB", (16, 16), "red").save(pictures / "00.png")
    build(pictures, Path(config.data.path), HELD_OUT, force=True)


def changed(config: TrainConfig, **sections: Any) -> TrainConfig:
    values = config.model_dump(mode="json")
    for name, section in sections.items():
        values[name] = values[name] | section if isinstance(section, Mapping) else section
    return parse(values)


def test_a_run_is_finished_with_its_recipe_and_its_pictures(
    place: pipeline.Place, config: TrainConfig, pictures: Path
) -> None:
    assert not pipeline.finished(place, config)
    train(place, config, step=5)
    assert not pipeline.finished(place, config)
    train(place, config)
    assert pipeline.finished(place, config)
    assert not pipeline.finished(place, changed(config, steps=4))
    repaint(config, pictures)
    assert not pipeline.finished(place, config)


def test_a_sweep_over_other_pictures_is_another_sweep(
    place: pipeline.Place, config: TrainConfig, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import ray_tune, tracking
    from training.sweep_config import SweepConfig, parse_domain

    folders: list[Path] = []

    class Tracker(SimpleNamespace):
        @classmethod
        def open(cls, _context: Any) -> Tracker:
            return cls(run_id="", log_metrics=print, log_artifact=print, close=print)

    def run(job: Any, on_event: Any) -> list[ray_tune.Trial]:
        folders.append(job.folder)
        job.folder.mkdir(parents=True, exist_ok=True)
        return [ray_tune.Trial(0, {}, "finished", 1, 0.5)]

    monkeypatch.setattr(pipeline, "connect", lambda _stack: None)
    monkeypatch.setattr(tracking, "Tracker", Tracker)
    monkeypatch.setattr(ray_tune, "run", run)
    sweep = SweepConfig(space=dict([parse_domain("optimizer.learning_rate=uniform(0.1, 0.2)")]))
    pipeline.sweep(place, config, sweep)
    pipeline.sweep(place, config, sweep)
    repaint(config, pictures)
    pipeline.sweep(place, config, sweep)
    assert folders[0] == folders[1] != folders[2]


def test_what_is_published_is_published_again_when_anything_of_it_changes(
    place: pipeline.Place, config: TrainConfig, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import ray_train

    made: list[int] = []

    def publish(job: Any, images: int, on_event: Any) -> dict[str, Any]:
        made.append(images)
        return {"name": "cats", "version": len(made), "metrics": {"kid_train_images": images}}

    monkeypatch.setattr(pipeline, "connect", lambda _stack: None)
    monkeypatch.setattr(pipeline, "_is_registered", lambda *_: True)
    monkeypatch.setattr(ray_train, "publish", publish)
    train(place, config)
    first = pipeline.publish(place, config, images=128)
    assert pipeline.publish(place, config, images=128) == first
    assert pipeline.publish(place, config, images=4096).metrics == {"kid_train_images": 4096}
    assert pipeline.publish(place, changed(config, seed=1), images=4096).version == 3
    (place.run_dir("cats") / "mlflow_run.json").write_text(json.dumps({"run_id": "def"}))
    assert pipeline.publish(place, changed(config, seed=1), images=4096).version == 4
    train(place, config, step=8)
    assert pipeline.publish(place, changed(config, seed=1), images=4096).version == 5
    repaint(config, pictures)
    assert pipeline.publish(place, changed(config, seed=1), images=4096).version == 6


def test_a_winner_is_kept_once_its_run_has_begun(place: pipeline.Place, config: TrainConfig) -> None:
    assert winner.kept(place, config, SEARCHED) is None
    train(place, changed(config, optimizer={"learning_rate": 0.0123}), step=2)
    assert winner.kept(place, config, SEARCHED) == {"optimizer.learning_rate": 0.0123}
    # what a run may change on its way
    longer = changed(config, steps=12, workers={"count": 2}, checkpoint={"every_steps": 1})
    assert winner.kept(place, longer, SEARCHED) == {"optimizer.learning_rate": 0.0123}


def test_a_run_that_began_otherwise_is_refused_by_name(
    place: pipeline.Place, config: TrainConfig, pictures: Path
) -> None:
    train(place, config, step=2)
    with pytest.raises(CheckpointError) as caught:
        winner.kept(place, changed(config, seed=5, model={"resolution": 64}), SEARCHED)
    text = caught.value.as_text()
    assert "model.resolution was 32 and is 64; seed was 0 and is 5" in text
    assert "--set name=OTHER" in text
    with pytest.raises(CheckpointError, match=r"optimizer\.learning_rate was"):
        winner.kept(place, changed(config, optimizer={"learning_rate": 0.5}), ())
    repaint(config, pictures)
    with pytest.raises(CheckpointError, match=r"the pictures in .*/data have changed"):
        winner.kept(place, config, SEARCHED)


def test_paths_are_absolute_before_they_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = pipeline.load("base", ["data.path=data/cats", "conditioning.encoder=models/mine"])
    assert isinstance(config.conditioning, TextConfig)
    assert (config.data.path, config.conditioning.encoder) == (f"{tmp_path}/data/cats", f"{tmp_path}/models/mine")
    config = pipeline.load("base", [], "a: b #1")
    assert config.data.path == f"{tmp_path}/a: b #1"
    assert pipeline.load("base", [], "s3://bucket/a: b #1/").data.path == "s3://bucket/a: b #1"
    config = pipeline.load("base", [])
    assert config.data.path == ""
    assert isinstance(config.conditioning, TextConfig)
    assert config.conditioning.encoder.startswith("packaged:")
    assert pipeline.load("smileys", ["data.path=/x"]) == pipeline.resolve(pipeline.load("smileys", ["data.path=/x"]))
