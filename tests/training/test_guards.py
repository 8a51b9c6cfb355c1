"""Steps that cannot be trusted are seen, undone and left out; an interrupted run judges as one that is not."""

import json
import math
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training import checkpoint, loop
from training.config import parse
from training.data.audit import audit
from training.data.batch import Batch
from training.errors import CheckpointError, ConfigError, TrainingError
from training.guards import Guard, LeftOut
from training.guards_config import GuardsConfig
from training.stopwatch import Stopwatch

CALM = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.02, 0.98, 1.01, 0.99]
SKIPPING = GuardsConfig(on_nonfinite="skip", on_spike="skip", spike_window=10, most_in_a_row=2, calm_steps=3)


def metrics(loss: float, norm: float = 1.0) -> dict[str, float]:
    return {"loss": loss, "gradient_norm": norm}


def calm(config: GuardsConfig = SKIPPING) -> Guard:
    """A guard that has seen ten calm steps."""
    guard = Guard(config)
    assert [guard.judge(metrics(loss)).action for loss in CALM] == ["take"] * 10
    return guard


@pytest.mark.parametrize("policy", ["stop", "skip", "rewind"])
@pytest.mark.parametrize("fault", [metrics(math.nan), metrics(math.inf), metrics(1.0, math.nan)])
def test_what_is_not_finite_is_dealt_with_as_the_recipe_says(policy: Any, fault: dict[str, float]) -> None:
    verdict = Guard(GuardsConfig(on_nonfinite=policy)).judge(fault)
    assert verdict.action == policy
    assert verdict.reason.startswith("not finite: loss ")


def test_a_spike_is_far_above_the_recent_steps_and_a_calm_run_has_none() -> None:
    guard = calm()
    assert guard.judge(metrics(2.9)).action == "take", "less than three times the median"
    verdict = guard.judge(metrics(30.0))
    assert verdict.action == "skip"
    assert verdict.reason == "loss 30 is a spike over 1.005, the median of recent steps"
    verdict = guard.judge(metrics(1.0, norm=50.0))
    assert (verdict.action, verdict.reason) == (
        "skip",
        "gradient_norm 50 is a spike over 1, the median of recent steps",
    )
    assert guard.judge(metrics(0.001)).action == "take", "far below is no fault"


def test_a_spike_does_not_become_the_measure_of_the_next_one() -> None:
    guard = calm(SKIPPING.model_copy(update={"most_in_a_row": 100}))
    assert [guard.judge(metrics(30.0)).action for _ in range(50)] == ["skip"] * 50


def test_spikes_are_ignored_unless_asked_for_and_while_too_little_is_known() -> None:
    ignoring = calm(SKIPPING.model_copy(update={"on_spike": "ignore"}))
    assert ignoring.judge(metrics(1e9)).action == "take"
    assert Guard(SKIPPING).judge(metrics(1e9)).action == "take"


def test_faults_in_a_row_end_the_run_and_calm_steps_begin_the_count_anew() -> None:
    guard = calm()
    assert [guard.judge(metrics(math.nan)).action for _ in range(2)] == ["skip", "skip"]
    verdict = guard.judge(metrics(math.nan))
    assert verdict.action == "stop"
    assert "after 2 faults in a row that were undone" in verdict.reason
    guard = calm()
    for _ in range(5):
        assert guard.judge(metrics(math.nan)).action == "skip"
        assert [guard.judge(metrics(1.0)).action for _ in range(3)] == ["take"] * 3


@given(st.lists(st.sampled_from([0.5, 1.0, 2.0, 40.0, math.nan]), max_size=60), st.integers(0, 60))
def test_a_guard_that_goes_on_from_a_checkpoint_judges_as_one_that_was_never_stopped(
    losses: list[float], kept_at: int
) -> None:
    config = SKIPPING.model_copy(update={"most_in_a_row": 5})
    whole, parts = Guard(config), Guard(config)
    for number, loss in enumerate(losses):
        if number == kept_at:
            parts = Guard(config, json.loads(json.dumps(parts.state())))
        assert whole.judge(metrics(loss)) == parts.judge(metrics(loss))
    assert whole.state() == parts.state()


def test_a_batch_without_a_readable_row_is_no_fault() -> None:
    assert calm().judge({"gradient_norm": 0.0}).action == "take"


def test_a_rewind_counts_what_was_left_out_before_it_once() -> None:
    guard = Guard(SKIPPING)
    guard.leave_out(LeftOut(3, 3, "skip", ""))
    guard.leave_out(LeftOut(12, 12, "skip", ""))
    guard.leave_out(LeftOut(11, 15, "rewind", ""))
    assert guard.left_out_steps == 6
    assert Guard(SKIPPING, json.loads(json.dumps(guard.state()))).left_out_steps == 6


class Sum:
    """A run whose state is a number: each step adds its own, and those that are named tell another loss."""

    def __init__(self, losses: Mapping[int, float], *, durable: int | None = 0) -> None:
        self.losses, self.durable = losses, durable
        self.value = 0
        self.kept: dict[int, int] = {}
        self.saved: dict[int, int] = {}
        self.left_out: list[LeftOut] = []
        self.told: dict[int, dict[str, float]] = {}
        if durable is not None:
            self.saved[durable] = 0

    def __call__(self, step: int, batch: Batch, clock: Stopwatch) -> Mapping[str, float]:  # noqa: ARG002  a Step
        with clock("forward"):
            self.value += 10**step
        return metrics(self.losses.get(step, 1.0))

    def restore(self, done: int) -> None:
        self.value = self.kept[done]

    def rewind(self) -> int:
        if not self.saved:
            raise CheckpointError("There is no checkpoint.")
        self.value = self.saved[max(self.saved)]
        return max(self.saved)

    def note(self, left_out: LeftOut, batch: Batch, told: Mapping[str, float]) -> str:  # noqa: ARG002  a hook
        self.left_out.append(left_out)
        return "left_out.jsonl"

    def run(self, guard: Guard, steps: int = 6, save_every: int = 3) -> tuple[int, bool]:
        hooks = loop.Hooks(
            keep=lambda done: self.kept.update({done: self.value}),
            restore=self.restore,
            rewind=self.rewind,
            note=self.note,
            commit=lambda *_: False,
            on_step=lambda done, told: self.told.update({done: dict(told)}),
            evaluate=lambda _: None,
            save=lambda done: self.saved.update({done: self.value}),
        )
        pace = loop.Pace(steps, evaluate_every=100, save_every=save_every, global_batch=1)
        return loop.run(self, iter([None] * steps), 0, pace, hooks, guard, Stopwatch())  # type: ignore[list-item]


def test_a_skipped_step_leaves_no_trace_in_the_state_and_its_batch_is_consumed() -> None:
    run = Sum({0: math.nan, 3: math.nan})
    assert run.run(Guard(SKIPPING)) == (6, False)
    assert run.value == 110110
    assert [(left.first_step, left.last_step, left.action) for left in run.left_out] == [(1, 1, "skip"), (4, 4, "skip")]
    assert [run.told[step]["left_out_steps"] for step in range(1, 7)] == [1, 1, 1, 2, 2, 2]
    assert "loss" not in run.told[4]


def test_a_rewind_goes_back_to_the_newest_checkpoint_and_leaves_the_batches_since_out() -> None:
    run = Sum({4: math.nan})
    run.run(Guard(GuardsConfig(on_nonfinite="rewind")))
    assert run.value == 100111
    assert [(left.first_step, left.last_step, left.action) for left in run.left_out] == [(4, 5, "rewind")]


def test_the_end_names_step_loss_and_the_file_with_the_samples() -> None:
    run = Sum({4: math.nan})
    with pytest.raises(TrainingError, match=r"diverged at step 5") as raised:
        run.run(Guard(GuardsConfig()))
    text = raised.value.as_text()
    assert "loss nan, gradient_norm 1" in text
    assert "left_out.jsonl names the batch's samples" in text
    assert max(run.saved) == 3, "nothing is kept of the step"
    with pytest.raises(TrainingError, match=r"diverged at step 1"):
        Sum({0: math.nan}, durable=None).run(Guard(GuardsConfig(on_nonfinite="rewind")))


def test_skipping_without_the_state_before_the_step_is_refused() -> None:
    recipe = {"data": {"path": "x"}, "guards": {"on_spike": "skip"}, "checkpoint": {"memory_every_steps": 5}}
    with pytest.raises(ConfigError, match=r"guards\.on_spike skip .* needs checkpoint\.memory_every_steps 1, not 5"):
        parse(recipe)


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_a_run_that_is_killed_after_a_fault_ends_as_one_that_was_not(
    runs: Any, policy: str, tmp_path: Path, running_process: Any
) -> None:
    """Real engines in two processes; what counts as a spike is set so that many steps do."""
    guards = {"spike_window": 10, "spike_factor": 1.01, "spike_deviations": 0.01, "most_in_a_row": 50}
    config = runs.config(
        steps=40, guards={"on_spike": policy, **guards}, checkpoint={"every_steps": 6}, evaluation={"images": 0}
    )
    whole = runs.start(config, "whole", world=2)
    assert [rank.end() for rank in whole] == [0, 0]
    assert whole[0].told("step")[-1]["metrics"]["left_out_steps"] > 0

    killed = runs.start(config, "killed", world=2)
    while not killed[0].until("step")["metrics"]["left_out_steps"]:
        pass
    for rank in reversed(killed):
        process = running_process(rank.log)
        if process is not None:  # the end of one may have ended the other
            os.kill(process, signal.SIGKILL)
        assert rank.end() != 0
    again = runs.start(config, "killed", world=2)
    assert [rank.end() for rank in again] == [0, 0]
    assert again[0].told("resumed"), "it went on"

    noted = [json.loads(line) for line in (tmp_path / "whole" / "left_out.jsonl").read_text().splitlines()]
    assert {line["action"] for line in noted} == {policy}
    assert all(len(line["sample_ids"]) == config["global_batch"] for line in noted)
    assert noted == [json.loads(line) for line in (tmp_path / "killed" / "left_out.jsonl").read_text().splitlines()]
    for run in ("whole", "killed"):
        report = audit(tmp_path / run)
        assert (report.steps, report.lost, report.duplicated, report.findings) == (40, 0, 0, [])
        assert [(each.first, each.last, each.reason) for each in report.undone] == [
            (line["first_step"], line["last_step"], line["reason"]) for line in noted
        ]
        assert report.undone_steps == whole[0].told("step")[-1]["metrics"]["left_out_steps"]
    ended = [checkpoint.newest(tmp_path / run / "checkpoints")[0] for run in ("whole", "killed")]
    for group in ("weights", "ema"):
        first, second = (state.load(group) for state in ended if state is not None)
        assert all(torch.equal(first[name], second[name]) for name in first)
