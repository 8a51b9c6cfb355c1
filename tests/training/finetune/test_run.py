"""Whole runs that start from a pipeline, through the real engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from training import checkpoint

STEPS = 3


def sections(pipeline: Path, **more: Any) -> dict[str, Any]:
    return {
        "steps": STEPS,
        "start": {"pipeline": str(pipeline)},
        "model": {"resolution": 32},
        "optimizer": {"kind": "adamw", "learning_rate": 1e-2},
        "checkpoint": {"every_steps": 2},
        **more,
    }


def recipe(runs: Any, pipeline: Path, **more: Any) -> dict[str, Any]:
    values: dict[str, Any] = runs.config(**sections(pipeline, **more))
    values["model"] = {"resolution": 32}  # the tiny recipe describes a network
    return values


def newest(run: Path) -> Any:
    found, refused = checkpoint.newest(run / "checkpoints")
    assert found is not None, refused
    return found


@pytest.mark.parametrize(("kind", "stage"), [("lora", 1), pytest.param("dora", 3, marks=pytest.mark.slow)])
def test_a_run_trains_keeps_and_averages_the_adapter_alone(
    runs: Any, tiny: Callable[[str], Path], tmp_path: Path, kind: str, stage: int
) -> None:
    config = recipe(runs, tiny("sd"), adapter={"kind": kind, "rank": 2}, engine={"zero_stage": stage})
    (rank,) = runs.start(config, "run")
    assert rank.end() == 0, rank.told("error")
    kept = newest(tmp_path / "run")
    for group in ("weights", "ema"):
        weights = kept.load(group)
        assert weights
        assert all(".lora_" in name for name in weights)
    assert any(value.any() for name, value in kept.load("ema").items() if ".lora_B." in name)


@pytest.mark.parametrize("layout", ["flux", pytest.param("sana", marks=pytest.mark.slow)])
def test_a_whole_network_is_trained_from_a_pipelines_weights(
    runs: Any, tiny: Callable[[str], Path], tmp_path: Path, layout: str
) -> None:
    config = recipe(runs, tiny(layout), conditioning={"max_tokens": 24})
    (rank,) = runs.start(config, "run")
    assert rank.end() == 0, rank.told("error")
    started = load_file(next((tiny(layout) / "transformer").glob("*.safetensors")))
    weights = {name.removeprefix("network."): value for name, value in newest(tmp_path / "run").load("weights").items()}
    assert set(weights) <= set(started)
    moved = [name for name in weights if not torch.equal(weights[name], started[name])]
    assert len(moved) == len(weights)
    assert max((weights[name] - started[name]).abs().max() for name in moved) < 0.1
