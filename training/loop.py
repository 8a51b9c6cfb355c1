"""Batches become steps, and steps are reported. Knows neither the objective nor how work is shared."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from training.data.batch import Batch


class Step(Protocol):
    """One optimizer step; the loop knows nothing else of training.

    Families with several networks, optimizers or a frozen teacher each bring their own.
    """

    def __call__(self, step: int, batch: Batch) -> Mapping[str, float]:
        """Train on ``batch`` as step number ``step`` (0-based); returns metrics, equal on every rank."""
        ...


@dataclass(frozen=True)
class Hooks:
    """What happens around the steps; each is called on every rank at the same step.

    Attributes:
        commit: gets the number of steps done and the batch that the last one consumed; True once any rank has been
            asked to leave.
        on_step: gets the number of steps done and that step's metrics.
        evaluate: gets the number of steps done.
        save: gets the number of steps done.
    """

    commit: Callable[[int, Batch], bool]
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


def run(step: Step, batches: Iterator[Batch], start: int, pace: Pace, hooks: Hooks) -> tuple[int, bool]:
    """Take steps ``start`` to ``pace.steps``.

    Returns:
        How many steps are done, and whether the run was asked to leave before its end.
    """
    for number in range(start, pace.steps):
        began = time.perf_counter()
        batch = next(batches)
        waited_s = time.perf_counter() - began
        metrics: dict[str, Any] = dict(step(number, batch))
        seconds = time.perf_counter() - began
        metrics |= {"images_per_s": pace.global_batch / seconds, "data_wait_share": waited_s / seconds}
        done = number + 1
        stop = hooks.commit(done, batch)
        hooks.on_step(done, metrics)
        last = done == pace.steps
        if last or (done % pace.evaluate_every == 0 and not stop):
            hooks.evaluate(done)
        if last or stop or done % pace.save_every == 0:
            hooks.save(done)
        if stop and not last:
            return done, True
    return pace.steps, False
