"""Interrupted runs end where uninterrupted ones do, bit for bit; and what is not the same run is refused."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from training import checkpoint
from training.data.audit import audit

STEPS, SAVE_EVERY = 40, 10
GROUPS = ("weights", "ema", "optimizer.exp_avg", "optimizer.exp_avg_sq")


def recipe(runs: Any, world: int, **sections: Any) -> dict[str, Any]:
    """Trains long enough to be interrupted, with a schedule that knows the number of steps."""
    sections.setdefault("schedule", {"kind": "wsd", "warmup_steps": 4, "decay_share": 0.5})
    sections.setdefault("checkpoint", {"every_steps": SAVE_EVERY, "keep": 2})
    return runs.config(steps=STEPS, workers={"count": world}, **sections)


def last(runs: Any, run: str) -> checkpoint.Checkpoint:
    found, refused = checkpoint.newest(runs.folder / run / "checkpoints")
    assert found is not None
    assert refused == []
    return found


def finish(runs: Any, config: Any, run: str, world: int) -> Any:
    """Run to the end; returns rank 0."""
    ranks = runs.start(config, run, world)
    assert [rank.end() for rank in ranks] == [0] * world, ranks[0].log.read_text()[-3000:]
    return ranks[0]


@pytest.mark.parametrize(("world", "stage"), [(1, 1), (2, 0), (2, 1), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_stopped_and_killed_runs_end_where_an_uninterrupted_one_does(
    runs: Any, running_process: Callable[[Path], int], world: int, stage: int
) -> None:
    """Stopped in its first steps, killed after its next checkpoint, and then left alone."""
    config = recipe(runs, world, engine={"zero_stage": stage})
    whole = finish(runs, config, "whole", world)

    ranks = runs.start(config, "parts", world)
    ranks[0].until("step")
    ranks[-1].process.stop()  # any rank may be the one that is asked
    assert [rank.end() for rank in ranks] == [0] * world
    (stopped,) = ranks[0].told("done")
    assert stopped["stopped"]
    assert last(runs, "parts").step == stopped["step"] < STEPS

    ranks = runs.start(config, "parts", world)
    assert ranks[0].until("resumed")["step"] == stopped["step"]
    saved = ranks[0].until("checkpoint")["step"]
    os.kill(running_process(ranks[-1].log), signal.SIGKILL)
    codes = [rank.end() for rank in ranks]
    assert codes[-1] == -signal.SIGKILL
    assert all(codes)

    killed_at = ranks[0].told("step")[-1]["step"]

    rank = finish(runs, config, "parts", world)
    resumed = rank.told("resumed")[0]["step"]
    from_storage = not rank.told("resumed")[0]["memory"]
    assert not from_storage or resumed % SAVE_EVERY == 0, "the nodes' memory is newer than any checkpoint but this one"
    assert saved <= killed_at - 1 <= resumed <= STEPS, "at most one step is done again"
    assert [event["step"] for event in rank.told("step")] == list(range(resumed + 1, STEPS + 1))
    for event, expected in zip(rank.told("step"), whole.told("step")[resumed:], strict=True):
        for metric in ("loss", "gradient_norm", "learning_rate"):
            assert event["metrics"][metric] == expected["metrics"][metric], (event["step"], metric)
    assert rank.told("evaluation")[-1] == whole.told("evaluation")[-1]
    expected, found = last(runs, "whole"), last(runs, "parts")
    assert (found.step, found.position) == (expected.step, expected.position) == (STEPS, STEPS * 8)
    for group in GROUPS:
        loaded, wanted = found.load(group), expected.load(group)
        assert loaded.keys() == wanted.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items()), group


def test_a_run_goes_on_with_another_number_of_workers_and_another_stage(runs: Any) -> None:
    fp32 = {"precision": "fp32", "zero_stage": 2}
    finish(runs, recipe(runs, 1, engine=fp32), "one", 1)
    ranks = runs.start(recipe(runs, 2, engine=fp32), "moved", 2)
    ranks[0].until("step")
    ranks[0].process.stop()
    assert [rank.end() for rank in ranks] == [0, 0]
    finish(runs, recipe(runs, 1, engine={"precision": "fp32", "zero_stage": 0}), "moved", 1)
    expected, found = last(runs, "one"), last(runs, "moved")
    for group in ("weights", "ema"):
        loaded = found.load(group)
        assert all(torch.allclose(loaded[name], tensor, atol=1e-3) for name, tensor in expected.load(group).items())
    with_two = finish(runs, recipe(runs, 2, engine=fp32), "one", 2)
    assert with_two.told("resumed")[0]["step"] == STEPS


def test_the_seen_samples_and_losses_do_not_depend_on_the_number_of_workers(runs: Any) -> None:
    """Of the eight rows of a global batch, three workers have three, three and two."""
    fp32, worlds = {"precision": "fp32"}, (1, 2, 3)
    one, *others = (finish(runs, recipe(runs, world, engine=fp32), f"world-{world}", world) for world in worlds)
    for other in others:
        for single, shared in zip(one.told("step"), other.told("step"), strict=True):
            assert single["metrics"]["loss"] == pytest.approx(shared["metrics"]["loss"], rel=1e-3)
        assert one.told("evaluation")[-1]["metrics"]["held_out_loss"] == pytest.approx(
            other.told("evaluation")[-1]["metrics"]["held_out_loss"], rel=1e-3
        )
    reports = [audit(runs.folder / f"world-{world}") for world in worlds]
    assert {(report.lost, report.duplicated, report.consumed) for report in reports} == {(0, 0, STEPS * 8)}
    assert len({report.digest for report in reports}) == 1


def test_a_run_waits_for_its_predecessor_and_goes_on_from_its_last_checkpoint(
    runs: Any, running_process: Callable[[Path], int]
) -> None:
    """The agent is gone, the process not yet: it has been stopped in the middle of its work."""
    config = recipe(runs, 1, checkpoint={"every_steps": 1000})
    (old,) = runs.start(config, "run")
    old.until("step")
    pid = running_process(old.log)
    os.kill(pid, signal.SIGSTOP)
    old.process.close()
    (new,) = runs.start(config, "run")
    waiting = new.until("warning")["message"]
    assert f"process {pid} on " in waiting
    assert "still works on this run" in waiting
    assert checkpoint.newest(runs.folder / "run" / "checkpoints") == (None, [])
    os.kill(pid, signal.SIGCONT)
    resumed = new.until("resumed")["step"]
    assert new.end() == 0
    assert 1 <= resumed < STEPS, "the step that the old process saved on its way out"
    assert [event["step"] for event in new.told("step")] == list(range(resumed + 1, STEPS + 1))
    assert last(runs, "run").step == STEPS


def test_the_wait_for_another_process_can_be_stopped_and_leaves_that_one_alone(runs: Any) -> None:
    config = runs.config(steps=100_000)
    (first,) = runs.start(config, "run")
    first.until("step")
    second = runs.start({**config, "workers": {"count": 2}}, "run", 2)
    second[0].until("warning")
    second[0].process.stop()
    assert [rank.end() for rank in second] == [0, 0]
    assert second[0].told("done") == [{"event": "done", "step": 0, "stopped": True}]
    first.until("step")
    first.process.stop()
    assert first.end() == 0
    (done,) = first.told("done")
    assert last(runs, "run").step == done["step"]


def test_all_ranks_go_on_from_what_rank_0_chose(runs: Any) -> None:
    """Rank 1 would see no checkpoint where it looks: it takes the one that it is told."""
    finish(runs, runs.config(), "run", 1)
    specs = runs.specs(runs.config(steps=8, workers={"count": 2}), "run", 2)
    specs[1]["run_dir"] = str(runs.folder / "elsewhere")
    ranks = [runs.launch("train", spec, runs.folder / f"again-{spec['rank']}.log") for spec in specs]
    assert [rank.end() for rank in ranks] == [0, 0]
    assert [event["step"] for event in ranks[0].told("step")] == [7, 8]
    assert ranks[0].told("done") == ranks[1].told("done") == [{"event": "done", "step": 8, "stopped": False}]


@pytest.fixture
def finished(runs: Any) -> Any:
    """A run of six steps."""
    config = runs.config(checkpoint={"every_steps": 3, "keep": 2})
    return finish(runs, config, "run", 1)


def test_a_finished_run_is_measured_again_and_not_trained(runs: Any, finished: Any) -> None:
    before = last(runs, "run").load("weights")
    again = finish(runs, runs.config(), "run", 1)
    assert again.told("step") == again.told("checkpoint") == []
    assert again.told("evaluation") == finished.told("evaluation"), "the averaged weights came back too"
    assert again.told("done") == [{"event": "done", "step": 6, "stopped": False}]
    assert all(torch.equal(before[name], tensor) for name, tensor in last(runs, "run").load("weights").items())


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(runs: Any, finished: Any) -> None:
    path = Path(last(runs, "run").path) / "optimizer-00000-of-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    again = finish(runs, runs.config(), "run", 1)
    (warning,) = again.told("warning")
    assert f"{path.name} is missing or altered" in warning["message"]
    assert str(path) in warning["message"]
    assert again.told("resumed")[0]["step"] == 3
    assert again.told("evaluation")[-1] == finished.told("evaluation")[-1], "and comes to the same end"


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("seed", 1),
        ("global_batch", 4),
        ("optimizer", {"learning_rate": 1e-4}),
        ("model", {"widths": [16, 16]}),
        ("ema.decay", 0.5),
    ],
)
def test_another_recipe_is_refused_in_words(runs: Any, finished: Any, section: str, value: Any) -> None:
    outer, _, inner = section.partition(".")
    (rank,) = runs.start(runs.config(**{outer: {inner: value} if inner else value}), "run")
    assert rank.end() == 1
    (error,) = rank.told("error")
    assert error["typed"] is True
    assert f"The run tiny began with another recipe: {section} has changed." in error["message"]
    assert "mend:" in error["message"]
    assert rank.told("step") == []


def test_another_recipe_is_refused_before_a_worker_starts(runs: Any, finished: Any) -> None:
    """By the driver, which has no torch."""
    code = (
        "import json, sys; from pathlib import Path; from training import config, errors, resume\n"
        "try: resume.refuse_early(config.parse(json.loads(sys.argv[1])), Path(sys.argv[2]))\n"
        "except errors.CheckpointError as error: print(error)\n"
        "else: print('the same')\n"
        "print('torch' in sys.modules)\n"
    )
    for config, said in ((runs.config(), "the same"), (runs.config(model={"widths": [16, 16]}), "model has changed")):
        command = [sys.executable, "-c", code, json.dumps(config), str(runs.folder / "run")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert said in done.stdout
        assert done.stdout.endswith("False\n")


def test_another_order_of_the_samples_is_another_recipe(runs: Any, finished: Any) -> None:
    (rank,) = runs.start(runs.config(data={"block": 7}), "run")
    assert rank.end() == 1
    (error,) = rank.told("error")
    assert "The run tiny began with another recipe: data.block has changed." in error["message"]
    assert finish(runs, runs.config(data={"prefetch": 3}), "run", 1).told("resumed")


def test_more_steps_and_another_pace_are_the_same_run(runs: Any, finished: Any) -> None:
    config = runs.config(steps=8, evaluation={"every_steps": 2, "images": 0}, engine={"zero_stage": 2})
    again = finish(runs, config, "run", 1)
    assert [event["step"] for event in again.told("step")] == [7, 8]
    assert again.told("samples") == []
