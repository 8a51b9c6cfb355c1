"""Whether a step can be trusted. Every rank judges the same numbers, and so alike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from training.errors import TrainingError
from training.guards_config import GuardsConfig

JUDGED = ("loss", "gradient_norm")
"""The metrics of a step that are looked at."""

Action = Literal["take", "stop", "skip", "rewind"]


@dataclass(frozen=True)
class Verdict:
    """What becomes of a step.

    Attributes:
        action: ``take`` it, or what the recipe says of such a fault.
        reason: what is wrong with it; empty for a step that is taken.
        clue: what may have caused it, for the message that ends a run.
    """

    action: Action
    reason: str = ""
    clue: str = ""


@dataclass(frozen=True)
class LeftOut:
    """Batches that were consumed and are not in the weights.

    Attributes:
        first_step: the first of them, 1-based.
        last_step: the last of them, which is the step that was judged.
        action: what the guard did.
        reason: why.
    """

    first_step: int
    last_step: int
    action: Action
    reason: str


class Guard:
    """Judges steps by the recent ones.

    Args:
        config: the recipe's section.
        state: of the checkpoint that the run goes on from; a run that was interrupted judges as one that was not.

    """

    def __init__(self, config: GuardsConfig, state: Mapping[str, Any] | None = None) -> None:
        state = state or {}
        self.config = config
        self._left_out: list[tuple[int, int]] = [(first, last) for first, last in state.get("left_out", [])]
        self._strikes = int(state.get("strikes", 0))
        self._calm = int(state.get("calm", 0))
        self._recent: dict[str, list[float]] = {name: list(state.get("recent", {}).get(name, [])) for name in JUDGED}

    def state(self) -> dict[str, Any]:
        """What a checkpoint carries; JSON."""
        return {
            "left_out": [list(steps) for steps in self._left_out],
            "strikes": self._strikes,
            "calm": self._calm,
            "recent": {name: list(values) for name, values in self._recent.items()},
        }

    def judge(self, metrics: Mapping[str, float]) -> Verdict:
        """Judge the step that has just been computed."""
        values = {name: metrics[name] for name in JUDGED if name in metrics}
        if not all(math.isfinite(value) for value in values.values()):
            clue = "a lower optimizer.learning_rate or more schedule.warmup_steps"
            return self._fault(self.config.on_nonfinite, f"not finite: {told(values)}", clue)
        policy = self.config.on_spike
        for name, value in values.items():
            median = None if policy == "ignore" else self._exceeded(name, value)
            if policy != "ignore" and median is not None:
                reason = f"{name} {value:.4g} is a spike over {median:.4g}, the median of recent steps"
                return self._fault(policy, reason, "the batch's samples, or guards.on_spike ignore")
        self._trust(values)
        return Verdict("take")

    @property
    def left_out_steps(self) -> int:
        """Steps whose batches are not in the weights, so far."""
        return sum(last - first + 1 for first, last in self._left_out)

    def leave_out(self, steps: LeftOut) -> None:
        """Take note of steps that were undone."""
        # a rewind goes back over all that was left out since, which counts once
        before = [(first, last) for first, last in self._left_out if first < steps.first_step]
        self._left_out = [*before, (steps.first_step, steps.last_step)]

    def _fault(self, action: Action, reason: str, clue: str) -> Verdict:
        self._strikes, self._calm = self._strikes + 1, 0
        if action != "stop" and self._strikes > self.config.most_in_a_row:
            reason = f"{reason}, after {self.config.most_in_a_row} faults in a row that were undone"
            return Verdict("stop", reason, clue)
        return Verdict(action, reason, clue)

    def _trust(self, values: Mapping[str, float]) -> None:
        self._calm += 1
        if self._calm >= self.config.calm_steps:
            self._strikes = 0
        for name, value in values.items():
            if value > 0:  # a batch of which nothing could be read has no gradient, and says nothing
                self._recent[name] = [*self._recent[name], value][-self.config.spike_window :]

    def _exceeded(self, name: str, value: float) -> float | None:
        """The median that ``value`` is a spike over."""
        recent = self._recent[name]
        if len(recent) < self.config.spike_window or value <= 0:
            return None
        logs = [math.log(each) for each in recent]
        median = statistics.median(logs)
        # 1.4826 makes of it the standard deviation of normal numbers (Rousseeuw and Croux 1993)
        deviation = 1.4826 * statistics.median(abs(each - median) for each in logs)
        bound = median + max(self.config.spike_deviations * deviation, math.log(self.config.spike_factor))
        return math.exp(median) if math.log(value) > bound else None


def told(metrics: Mapping[str, float]) -> str:
    """Metrics in one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def end(step: int, metrics: Mapping[str, float], verdict: Verdict, record: str) -> TrainingError:
    """The error that ends a run whose step cannot be trusted.

    Args:
        step: the step, 1-based.
        metrics: its numbers.
        verdict: what was judged.
        record: the file that names the batch's samples; empty where there is none.
    """
    return TrainingError(
        f"Training has diverged at step {step}.",
        value=told(metrics),
        rule=f"a finite loss and gradient, near those of recent steps; here: {verdict.reason}",
        mend=f"a new run (--set name=...) with {verdict.clue};"
        + (f" {record} names the batch's samples;" if record else "")
        + " the checkpoints of earlier steps are kept",
    )
