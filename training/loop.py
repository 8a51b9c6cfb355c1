"""Batches become steps, and steps are judged and reported. Knows neither the objective nor how work is shared."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from training.data.batch import Batch
from training.errors import CheckpointError
from training.guards import Guard, LeftOut, end
from training.stopwatch import Stopwatch


class Step(Protocol):
    """One optimizer step; the loop knows nothing else of training.

    Families with several networks, optimizers or a frozen teacher each bring their own.
    """

    def __call__(self, step: int, batch: Batch, clock: Stopwatch) -> Mapping[str, float]:
        """Train on ``batch`` as step number ``step`` (0-based), its parts timed; returns metrics.

        The metrics are equal on every rank, bit for bit: the guard judges them everywhere alike.
        """
        ...


@dataclass(frozen=True)
class Hooks:
    """What happens around the steps; each is called on every rank at the same step.

    Attributes:
        keep: gets the number of steps done; the state is now that which ``restore`` of this number brings back.
        restore: gets the number of steps done after which the state was last kept; weights, optimizer and average are
            again as they were.
        rewind: the state is again that of the newest durable checkpoint, one that is still being written included;
            returns its step.
        note: gets what was left out, the batch that was judged, and that step's metrics; returns the file that names
            the batch's samples.
        commit: gets the number of steps done, the batch that the last one consumed, and what of it was left out; True
            once any rank has been asked to leave.
        on_step: gets the number of steps done and that step's metrics.
        evaluate: gets the number of steps done.
        save: gets the number of steps done.
    """

    keep: Callable[[int], None]
    restore: Callable[[int], None]
    rewind: Callable[[], int]
    note: Callable[[LeftOut, Batch, Mapping[str, float]], str]
    commit: Callable[[int, Batch, LeftOut | None], bool]
    on_step: Callable[[int, Mapping[str, float]], None]
    evaluate: Callable[[int], None]
    save: Callable[[int], None]


@dataclass(frozen=True)
class Pace:
    """When the hooks run, in steps."""

    steps: int
    evaluate_every: int
    save_every: int
    global_batch: int


def run(
    step: Step, batches: Iterator[Batch], start: int, pace: Pace, hooks: Hooks, guard: Guard, clock: Stopwatch
) -> tuple[int, bool]:
    """Take steps ``start`` to ``pace.steps``.

    Returns:
        How many steps are done, and whether the run was asked to leave before its end.

    Raises:
        TrainingError: a step cannot be trusted, and the recipe says that the run stops.
    """
    hooks.keep(start)
    for number in range(start, pace.steps):
        done = clock.step = number + 1
        began = time.perf_counter()
        with clock("data"):
            batch = next(batches)
        metrics: dict[str, Any] = dict(step(number, batch, clock))
        left_out = _judge(guard, hooks, done, batch, metrics)
        with clock("checkpoint"):
            hooks.keep(done)
        metrics |= {"images_per_s": pace.global_batch / (time.perf_counter() - began)}
        stop = hooks.commit(done, batch, left_out)
        hooks.on_step(done, metrics)
        last = done == pace.steps
        if last or (done % pace.evaluate_every == 0 and not stop):
            with clock("evaluation"):
                hooks.evaluate(done)
        if last or stop or done % pace.save_every == 0:
            with clock("checkpoint"):
                hooks.save(done)
        if stop and not last:
            return done, True
    return pace.steps, False


def _judge(guard: Guard, hooks: Hooks, done: int, batch: Batch, metrics: dict[str, Any]) -> LeftOut | None:
    """Undo a step that cannot be trusted, as the recipe says, and say what was left out."""
    verdict = guard.judge(metrics)
    left_out = None
    if verdict.action == "skip":
        hooks.restore(done - 1)
        left_out = LeftOut(done, done, verdict.action, verdict.reason)
    elif verdict.action == "rewind":
        try:
            left_out = LeftOut(hooks.rewind() + 1, done, verdict.action, verdict.reason)
        except CheckpointError as error:
            raise end(done, metrics, verdict, "") from error
    elif verdict.action == "stop":
        stopped = LeftOut(done, done, verdict.action, verdict.reason)
        raise end(done, metrics, verdict, hooks.note(stopped, batch, metrics))
    if left_out is not None:
        guard.leave_out(left_out)
        hooks.note(left_out, batch, metrics)
        for name in [name for name, value in metrics.items() if not math.isfinite(value)]:
            del metrics[name]  # told by the note; a chart has no place for it
    metrics["left_out_steps"] = guard.left_out_steps
    return left_out
