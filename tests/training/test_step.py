"""A step that diverges ends the run with its reason, on every rank, before a checkpoint is made of it."""

from pathlib import Path
from typing import Any

import pytest

from training import checkpoint


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_what_diverges_stops_in_words(runs: Any, tmp_path: Path, zero_stage: int) -> None:
    config = runs.config(
        optimizer={"learning_rate": 1e30},
        schedule={"kind": "constant", "warmup_steps": 0},
        engine={"zero_stage": zero_stage},
        checkpoint={"every_steps": 1},
        evaluation={"images": 0},
    )
    ranks = runs.start(config, "diverging", world=2)
    assert [rank.end() for rank in ranks] == [1, 1]
    told = [rank.told("error") for rank in ranks]
    (error,) = told[0]
    assert told[1][0]["message"] == error["message"], "both ranks see the same"
    assert error["typed"]
    assert "Training has diverged at step 2." in error["message"]
    assert "optimizer.learning_rate" in error["message"]
    found, refused = checkpoint.newest(tmp_path / "diverging" / "checkpoints")
    assert found is not None
    assert (found.step, refused) == (1, []), "the step that diverged is not kept"


def test_averaged_weights_that_diverge_are_never_measured(runs: Any) -> None:
    # the weights are gone after the first step, but its own loss and gradient were those of the fresh network
    config = runs.config(
        steps=1,
        optimizer={"learning_rate": 1e38},
        schedule={"kind": "constant", "warmup_steps": 0},
        evaluation={"images": 0},
    )
    (rank,) = runs.start(config, "gone")
    assert rank.end() == 1
    (error,) = rank.told("error")
    assert "The held-out loss is not a number" in error["message"]
    assert not rank.told("evaluation")
