"""How trials are ranked and remembered, without running any."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from training.config import load_recipe
from training.data.build import build
from training.data.config import BuildConfig
from training.errors import DataError
from training.sweep import SweepJob, Trial, check_held_out, rank, read_trial, write_trial
from training.sweep_config import Choice, SweepConfig


def _trial(number: int, status: Literal["finished", "stopped", "failed"], step: int, loss: float | None) -> Trial:
    return Trial(number, {}, status, step, loss)


def test_a_failed_trial_never_wins() -> None:
    trials = [
        _trial(0, "failed", 8, 0.01),
        _trial(1, "stopped", 2, 0.3),
        _trial(2, "finished", 8, 0.5),
        _trial(3, "failed", 0, None),
        _trial(4, "finished", 8, 0.4),
        _trial(5, "stopped", 4, 0.9),
    ]
    assert [trial.number for trial in rank(trials)] == [4, 2, 5, 1, 0, 3]


def _build(folder: Path, first: int, held_out: float) -> None:
    source = folder / f"pictures-{first}"
    source.mkdir()
    for number in range(first, first + 20):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(source / f"{number}.png")
    build(source, folder / "data", BuildConfig(held_out=held_out), force=True)


def _job(folder: Path, **sweep: Any) -> SweepJob:
    space = {"optimizer.learning_rate": Choice(values=(1e-3, 1e-4))}
    recipe = load_recipe("base", [f"data.path={folder / 'data'}"])
    return SweepJob(recipe, SweepConfig(space=space, **sweep), folder / "sweep", "http://127.0.0.1:9")


def test_a_result_is_of_its_recipe_and_data(tmp_path: Path) -> None:
    _build(tmp_path, 0, held_out=0.3)
    job = _job(tmp_path)
    check_held_out(job.data)
    assert read_trial(job, 1) is None
    kept = Trial(1, job.sweep.values(1), "finished", 100, 0.25)
    write_trial(job, kept)
    assert read_trial(_job(tmp_path), 1) == kept
    assert read_trial(_job(tmp_path, steps=99), 1) is None, "another recipe"
    _build(tmp_path, 100, held_out=0.3)
    assert read_trial(_job(tmp_path), 1) is None, "other pictures at the same path"


def test_nothing_held_out_is_refused(tmp_path: Path) -> None:
    _build(tmp_path, 0, held_out=0.0)
    with pytest.raises(DataError, match=r"no held-out pictures(.*\n)*.*0 held out(.*\n)*.*--held-out"):
        check_held_out(_job(tmp_path).data)
