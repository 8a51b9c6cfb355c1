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
from training.states import CaptionStates


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

    def forward(
        self, clean: torch.Tensor, conditioning: Conditioning, draws: Draws, valid: torch.Tensor
    ) -> torch.Tensor:
        """The loss ``[]`` of a micro-batch: the mean over its rows, of which those that are not ``valid [B]`` are 0.

        So a sample that cannot be read has no gradient, and the others weigh what they weigh in every batch: nothing
        depends on which rank or micro-batch the row was in.
        """
        losses = self.objective.loss(self.predict, clean, conditioning, draws)
        return torch.where(valid, losses, torch.zeros_like(losses)).mean()


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
        captions: CaptionStates,
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

        The loss that is told is the mean over the rows that could be read, of all ranks; without any, none is told.

        Raises:
            TrainingError: the loss or the gradient is not finite, on every rank alike, for both are the whole batch's.
        """
        rate = self.engine.peak_learning_rate * self.schedule.factor(step, self.steps)
        loss, norm = self.engine.step(self._micro_batches(batch), rate)
        told = torch.stack([loss, loss.new_tensor(sum(batch.valid) / len(batch))])
        dist.all_reduce(told)
        total, shares = told.tolist()
        metrics = {"gradient_norm": norm, "learning_rate": rate}
        if shares:
            metrics["loss"] = total / shares
        _check_finite(step, metrics)
        self.ema.update(step)
        return metrics

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[torch.Tensor, Conditioning, Draws, torch.Tensor]]:
        rows, device = self.engine.micro_batch, self.engine.device
        for start in range(0, len(batch.sample_ids), rows):
            part = slice(start, start + rows)
            ids = list(batch.sample_ids[part])
            images = as_clean(batch.images[part], device)
            draws = self.objective.draw(self.seed, list(batch.epochs[part]), ids, tuple(images.shape[1:]))
            captions = self.captions.rows(ids).where(draws.keep_caption, self.unconditional)
            valid = torch.tensor(batch.valid[part], device=device)
            yield images, captions.to(device), draws.to(device), valid


def as_clean(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What the loader delivers as what networks see: uint8 pixels become -1..1, and latents stay what they are.

    Returns:
        float32 on the device, of the shape of ``images``.
    """
    # bytes travel, a quarter of what floats would be, and while the device still works on what came before
    moved = images.to(device, non_blocking=True)
    values = moved.to(torch.float32, memory_format=torch.contiguous_format)
    return values.div_(127.5).sub_(1.0) if images.dtype == torch.uint8 else values


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
