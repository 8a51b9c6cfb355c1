"""One optimizer step, on one screen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from training.conditioning import Conditioning
from training.data.batch import Batch
from training.ema import Ema
from training.errors import TrainingError
from training.models import apply_unet
from training.objectives import Draws, ObjectiveConfig
from training.optim import ScheduleConfig
from training.parallel import Engine


class ObjectiveLoss(torch.nn.Module):
    """The module that the engine trains: a network under an objective.

    Args:
        network: the diffusers model.
        objective: how it is trained.
    """

    def __init__(self, network: Any, objective: ObjectiveConfig) -> None:
        super().__init__()
        self.network = network
        self.objective = objective

    def predict(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The network contract."""
        return apply_unet(self.network, x, t, conditioning)

    def forward(self, clean: torch.Tensor, conditioning: Conditioning, draws: Draws) -> torch.Tensor:
        """The mean loss ``[]`` of a micro-batch."""
        return self.objective.loss(self.predict, clean, conditioning, draws).mean()


class DiffusionStep:
    """Denoising one batch: draws, forward, backward, update, average.

    Args:
        engine: holds the module, the optimizer and the shards.
        objective: draws the random numbers.
        captions: states of the training captions, a row per sample id.
        unconditional: the row of the empty caption.
        ema: the averaged weights.
        schedule: the learning rate's shape.
        steps: how many the run has.
        seed: keys every draw.
    """

    def __init__(
        self,
        engine: Engine,
        objective: ObjectiveConfig,
        captions: Conditioning,
        unconditional: Conditioning,
        ema: Ema,
        schedule: ScheduleConfig,
        steps: int,
        seed: int,
    ) -> None:
        self.engine, self.objective, self.ema = engine, objective, ema
        self.captions, self.unconditional = captions, unconditional
        self.schedule, self.steps, self.seed = schedule, steps, seed

    def __call__(self, step: int, batch: Batch) -> Mapping[str, float]:
        """Train on this rank's share of a global batch.

        Raises:
            TrainingError: the loss or the gradient is not finite, on every rank alike, for both are the whole batch's.
        """
        rate = self.engine.peak_learning_rate * self.schedule.factor(step, self.steps)
        loss, norm = self.engine.step(self._micro_batches(batch), rate)
        dist.all_reduce(loss)
        metrics = {"loss": float(loss) / dist.get_world_size(), "gradient_norm": norm, "learning_rate": rate}
        _check_finite(step, metrics)
        self.ema.update(step)
        return metrics

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[torch.Tensor, Conditioning, Draws]]:
        rows, device = self.engine.micro_batch, self.engine.device
        for start in range(0, len(batch.sample_ids), rows):
            part = slice(start, start + rows)
            ids = list(batch.sample_ids[part])
            images = batch.images[part].to(device)
            draws = self.objective.draw(self.seed, list(batch.epochs[part]), ids, tuple(images.shape[1:]))
            captions = self.captions.rows(torch.tensor(ids)).where(draws.keep_caption, self.unconditional)
            yield images, captions.to(device), draws.to(device)


def _check_finite(step: int, metrics: Mapping[str, float]) -> None:
    """A weight that is not a number never becomes one again: stop before a checkpoint is made of it."""
    if all(math.isfinite(value) for value in metrics.values()):
        return
    raise TrainingError(
        f"Training has diverged at step {step + 1}.",
        value=", ".join(f"{name} {value:.4g}" for name, value in metrics.items()),
        rule="a finite loss and gradient",
        mend="a new run (--set name=...) with a lower optimizer.learning_rate or more schedule.warmup_steps;"
        " the checkpoints of earlier steps are kept",
    )
