"""A run whose training processes are killed by somebody who follows its events."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from training import ray_train
from training.config import load_recipe

TINY = Path(__file__).resolve().parents[1] / "end_to_end" / "tiny.yaml"


def train(
    run_dir: Path, data: Path, on_event: Callable[[dict[str, Any]], None], *assignments: str, recipe: str = str(TINY)
) -> ray_train.TrainOutcome:
    """Train a recipe in this process's Ray, without MLflow."""
    run_dir.mkdir(parents=True, exist_ok=True)
    config = load_recipe(recipe, [f"data.path={data}", f"name={run_dir.name}", *assignments])
    return ray_train.fit(ray_train.TrainJob(config, run_dir, ""), on_event)


def training_process(run_dir: Path, rank: int) -> psutil.Process | None:
    """The process that writes a rank's log, and did not begin to end."""
    log = run_dir / "logs" / f"rank-{rank}.log"
    for process in psutil.process_iter():
        try:
            if Path(f"/proc/{process.pid}/fd/1").readlink() == log:
                return process
        except OSError:  # another user's, or gone
            continue
    return None


@dataclass
class Killer:
    """Kills one rank's training process at seeded moments, and notes how the run goes on.

    Args:
        run_dir: the run's folder.
        kills: how often.
        seed: of ranks and moments.
        steps_between: fewest and most steps from one kill to the next.

    Attributes:
        recovery_s: of each kill, seconds until a step was done that had never been done.
        told: the warnings.
        redone: of each time it went on, how many steps that had been told it did again.
    """

    run_dir: Path
    kills: int
    seed: int = 0
    steps_between: tuple[int, int] = (3, 9)
    world: int = 2
    recovery_s: list[float] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    redone: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)  # noqa: S311  moments, not secrets
        self._next = self._random.randint(*self.steps_between)
        self._killed_s: float | None = None
        self._best = 0

    def __call__(self, event: dict[str, Any]) -> None:
        """Take an event of the run."""
        if event["event"] == "warning":
            self.told.append(event["message"])
        elif event["event"] == "resumed":
            self.redone.append(max(0, self._best - event["step"]))
        elif event["event"] == "step":
            self._on_step(event["step"], event["time_s"])

    def _on_step(self, step: int, time_s: float) -> None:
        if step <= self._best:
            return
        self._best = step
        if self._killed_s is not None:
            if time_s < self._killed_s:  # done before the kill, and told late
                return
            self.recovery_s.append(time_s - self._killed_s)
            self._killed_s, self._next = None, step + self._random.randint(*self.steps_between)
        if step >= self._next and len(self.recovery_s) < self.kills:
            time.sleep(self._random.uniform(0.0, 0.05))  # so that any part of a step is hit
            victim = training_process(self.run_dir, self._random.randrange(self.world))
            if victim is not None:
                self._killed_s = time.time()
                victim.kill()
