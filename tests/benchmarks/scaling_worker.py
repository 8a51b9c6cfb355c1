"""Ranks whose device only sleeps: ``python -m tests.benchmarks.scaling_worker SOCKET`` is their fork server.

Loop, guards, accounts, node memory, checkpoints, metrics and the agent's protocol are those of every run; in place of
network, optimizer and evaluation there is a pause, and each rank's state is a small shard.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from training import fork_server, worker
from training.data.batch import Batch
from training.engine_state import Part, StateSource
from training.run import Run
from training.states import RunStates
from training.stopwatch import Stopwatch

SHARD = 1 << 12
"""Values of each rank's state."""
PAUSE = "DARKROOM_BENCHMARK_PAUSE_S"
"""Of the server's environment: how long the device is busy with a step."""


class Shard:
    """One rank's part of a state of one tensor."""

    def __init__(self, group: str) -> None:
        self.group, self.values = group, torch.full((SHARD,), float(dist.get_rank()))
        shape = (SHARD * dist.get_world_size(),)
        self._parts = [Part(group, "shard", shape, SHARD * dist.get_rank(), self.values)]

    def parts(self) -> list[Part]:
        return self._parts

    def take(self, source: StateSource) -> None:
        start = SHARD * dist.get_rank()
        self.values.copy_(source.read(self.group, "shard", start, start + SHARD))

    def scalars(self) -> Mapping[str, float]:
        return {"step": 0.0}


class Average(Shard):
    """What a run looks at of an average."""

    tracked: Sequence[object] = ()


class Engine(Shard):
    """What a run looks at of an engine."""

    precision, device = "fp32", torch.device("cpu")


class Pause:
    """A step whose work takes as long however many ranks there are; what ranks tell one another is real."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, step: int, batch: Batch, clock: Stopwatch) -> Mapping[str, float]:
        with clock("forward"):
            time.sleep(self.seconds)
        with clock("communication"):
            told = torch.tensor([1.0 / (step + 1), float(sum(batch.valid)), 1.0 if dist.get_rank() == 0 else 0.0])
            dist.all_reduce(told)
            total, _, norm = told.tolist()
        return {"gradient_norm": norm, "learning_rate": 1e-3, "loss": total / dist.get_world_size()}


class MockedRun(Run):
    """A run without network and evaluation."""

    def _build(self, _states: RunStates) -> None:
        stand_in: Any = (Engine("weights"), Average("ema"), None, Pause(float(os.environ[PAUSE])))
        self.engine, self.ema, self.evaluator, self.step = stand_in

    def _evaluate(self, done: int) -> None:
        self.emit({"event": "evaluation", "step": done, "metrics": {}})


def main(arguments: Sequence[str]) -> None:
    """Serve."""
    worker.Run = MockedRun  # type: ignore[attr-defined]
    pause_s = os.environ[PAUSE]
    real = worker.main

    def told(task: str, spec: Mapping[str, Any], emit: Any) -> int:
        os.environ[PAUSE] = pause_s  # a forked process gets the environment of its agent
        return real(task, spec, emit)

    worker.main = told
    fork_server.serve(Path(arguments[0]), None)


if __name__ == "__main__":
    main(sys.argv[1:])
