"""What self-tests train: a small network on drawn batches, with the real engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from training.ema import Ema, EmaConfig
from training.engine_config import EngineConfig
from training.noise import normal
from training.optim import AdamWConfig, OptimizerConfig
from training.parallel import Engine
from training.stopwatch import Stopwatch

WIDTH = 320
"""Its square is above the 1e5 elements below which ZeRO 3 keeps a weight whole on every rank."""
ROWS_PER_RANK = 4
OPTIMIZER = AdamWConfig(learning_rate=2e-3, weight_decay=0.2)
CLIP = 1.0


@dataclass(frozen=True)
class Ground:
    """Where a check stands.

    Attributes:
        folder: empty, seen by every rank, removed afterwards.
        rank: of this process.
        world: how many there are.
    """

    folder: Path
    rank: int
    world: int

    @property
    def global_batch(self) -> int:
        """Rows of a step over all ranks."""
        return ROWS_PER_RANK * self.world

    def batch(self, step: int) -> torch.Tensor:
        """This rank's rows of a step, ``[4,8]``."""
        return normal(0, "self-test", step, shape=(self.global_batch, 8))[self.rank :: self.world]

    def engine(
        self,
        stage: int = 1,
        micro_batch: int | None = None,
        precision: str = "fp32",
        optimizer: OptimizerConfig = OPTIMIZER,
    ) -> Engine:
        """An engine over fresh weights, the same on every rank."""
        values = {"zero_stage": stage, "micro_batch": micro_batch, "precision": precision, "gradient_clip": CLIP}
        return Engine(Probe(), optimizer, EngineConfig.model_validate(values), self.global_batch)

    def average(self, engine: Engine, config: EmaConfig) -> Ema:
        """The average of an engine's weights."""
        return Ema(config, engine.weights, engine.device, engine.average_into)

    def train(
        self, engine: Engine, first: int, last: int, after: Callable[[int], None] = lambda _: None
    ) -> list[float]:
        """Steps ``first`` to ``last``; the loss of each, the mean over all ranks."""
        losses = []
        for step in range(first, last):
            rows = self.batch(step).to(engine.device)
            loss, _ = engine.step(_micro_batches(rows, engine.micro_batch), engine.peak_learning_rate, Stopwatch())
            losses.append(self.mean(loss))
            after(step)
        return losses

    def mean(self, value: torch.Tensor) -> float:
        """Over the ranks."""
        whole = value.detach().clone()
        dist.all_reduce(whole)
        return float(whole) / self.world


class Probe(torch.nn.Module):
    """A fixed network under a loss. Seven outputs: a weight that two ranks cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        layers = [torch.nn.Linear(8, WIDTH), torch.nn.SiLU(), torch.nn.Linear(WIDTH, WIDTH), torch.nn.LayerNorm(WIDTH)]
        self.layers = torch.nn.Sequential(*layers, torch.nn.SiLU(), torch.nn.Linear(WIDTH, 7))
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                scale = 0.05 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
                parameter.copy_(normal(0, name, shape=tuple(parameter.shape)) * scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean loss of rows ``[B,8]``."""
        answer: torch.Tensor = self.layers(x)
        return (answer.float() - 3 * x.flip(1)[:, :7]).square().mean()


def _micro_batches(rows: torch.Tensor, size: int) -> Iterator[tuple[Any, ...]]:
    return iter([(part,) for part in rows.split(size)])


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest difference of any element, relative to the largest of its tensor, and which tensor has it."""
    worst, where = 0.0, ""
    for name, expected in theirs.items():
        wanted = expected.detach().double().cpu()
        gap = float((ours[name].double().cpu() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
        if not gap <= worst:  # also where it is no number
            worst, where = gap, name
    return worst, where
