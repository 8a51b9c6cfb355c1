"""Networks that draw latents, or are told classes or nothing: trained, resumed, bundled and sampled like any other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from training import checkpoint
from training.config import parse
from training.data.dataset import Dataset
from training.errors import ConfigError
from training.latents import canvas_of, latents_job

DIT = {"family": "dit", "layers": 1, "heads": 2, "head_width": 8}
TRANSFORMER = {"layers": 1, "heads": 2, "head_width": 8, "resolution": 8}
KINDS: dict[str, dict[str, Any]] = {
    "a UNet that is told nothing": {"conditioning": {"kind": "none"}},
    "an MM-DiT": {"model": {"family": "sd3", **TRANSFORMER}, "conditioning": {"kind": "text", "max_tokens": 12}},
    "a PixArt": {"model": {"family": "pixart", **TRANSFORMER}, "conditioning": {"kind": "text", "max_tokens": 12}},
}


def trained(runs: Any, name: str, sections: dict[str, Any], steps: int) -> Any:
    """A tiny run to a step; the same name goes on."""
    config = runs.config(steps=steps, evaluation={"every_steps": 1000}, checkpoint={"every_steps": 2}, **sections)
    if "model" in sections:
        config["model"] = sections["model"]
    (rank,) = runs.start(config, name)
    assert rank.end() == 0, rank.log.read_text()[-3000:]
    losses = [event["metrics"]["loss"] for event in rank.told("step")]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)
    (measured,) = rank.told("evaluation")
    assert math.isfinite(measured["metrics"]["held_out_loss"])
    with Image.open(rank.told("samples")[-1]["path"]) as sheet:
        assert sheet.width > 16
    return rank


def kept(runs: Any, name: str) -> dict[str, torch.Tensor]:
    """The weights and their average of a run's newest checkpoint."""
    found, refused = checkpoint.newest(runs.folder / name / "checkpoints")
    assert found is not None
    assert not refused
    return {f"{group} {key}": value for group in ("weights", "ema") for key, value in found.load(group).items()}


def test_classes_in_latents_go_on_exactly_where_they_ended(runs: Any, autoencoder_directory: Path) -> None:
    sections = {
        "model": {**DIT, "resolution": 16},
        "conditioning": {"kind": "class"},
        "latents": {"autoencoder": str(autoencoder_directory)},
        "data": {"augment": {"flip": 0.5}},
    }
    trained(runs, "whole", sections, 4)
    trained(runs, "parted", sections, 2)
    again = trained(runs, "parted", sections, 4)
    (resumed,) = again.told("resumed")
    assert resumed["step"] == 2
    whole, parted = kept(runs, "whole"), kept(runs, "parted")
    assert whole.keys() == parted.keys()
    assert all(torch.equal(whole[name], parted[name]) for name in whole)
    table = next(value for name, value in whole.items() if "embedding_table" in name)
    train = Dataset.open(runs.data).split("train")
    assert len(table) == len({train.caption(sample_id) for sample_id in range(len(train))}) + 1


@pytest.mark.parametrize("kind", list(KINDS))
def test_it_trains(runs: Any, kind: str) -> None:
    first = trained(runs, "run", KINDS[kind], 2)
    assert len(first.told("step")) == 2


def test_latents_that_do_not_fit_are_refused_in_words(tiny_data: Path, autoencoder_directory: Path) -> None:
    recipe = {"data": {"path": str(tiny_data)}, "latents": {"autoencoder": str(autoencoder_directory)}}
    recipe |= {"conditioning": {"kind": "none"}, "model": {**DIT, "resolution": 20, "patch": 4}}
    with pytest.raises(ConfigError) as caught:
        canvas_of(parse(recipe))
    text = str(caught.value)
    assert "The network does not take the autoencoder's latents." in text
    assert "resolution 20, 2 pixels of a side for one value" in text
    assert "a side of 10 must be a multiple of 4, the patch: 8 or 12" in text
    varied = {**recipe, "data": {"path": str(tiny_data), "augment": {"rotate_degrees": 5}}}
    with pytest.raises(ConfigError, match="cannot be kept"):
        latents_job(parse(varied))
