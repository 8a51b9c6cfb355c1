"""One optimizer step, on one screen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from training import models
from training.conditioning import Conditioning
from training.data.batch import Batch
from training.ema import Ema
from training.objectives import Draws, ObjectiveConfig
from training.optim import ScheduleConfig
from training.parallel import Engine
from training.states import CaptionStates
from training.stopwatch import Stopwatch


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
        return models.apply(self.network, x, t, conditioning)

    def forward(
        self, clean: torch.Tensor, conditioning: Conditioning, draws: Draws, weight: torch.Tensor
    ) -> torch.Tensor:
        """The loss ``[]`` of a micro-batch: the mean over its rows, each times its ``weight [B]``.

        A row of weight 0 has no gradient whatever it holds, a number that is not finite included.
        """
        losses = self.objective.loss(self.predict, clean, conditioning, draws)
        return torch.where(weight > 0, losses * weight, torch.zeros_like(losses)).mean()


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
        global_batch: rows of a step over all ranks.
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
        global_batch: int,
    ) -> None:
        self.engine, self.objective, self.ema = engine, objective, ema
        self.captions, self.unconditional = captions, unconditional
        self.schedule, self.steps, self.seed, self.global_batch = schedule, steps, seed, global_batch

    def __call__(self, step: int, batch: Batch, clock: Stopwatch) -> Mapping[str, float]:
        """Train on this rank's share of a global batch.

        The loss that is told is the mean over the rows that could be read, of all ranks; without any, none is told.
        """
        rate = self.engine.peak_learning_rate * self.schedule.factor(step, self.steps)
        loss, norm = self.engine.step(self._micro_batches(batch), rate, clock)
        with clock("communication"):
            # one rank's norm is everyone's: the guards of all ranks judge the same bits
            norms = loss.new_tensor(norm if dist.get_rank() == 0 else 0.0)
            told = torch.stack([loss, loss.new_tensor(sum(batch.valid)), norms])
            dist.all_reduce(told)
            total, valid, norm = told.tolist()
        metrics = {"gradient_norm": norm, "learning_rate": rate, **self.engine.metrics()}
        if valid:
            metrics["loss"] = total / (dist.get_world_size() * (valid / self.global_batch))
        with clock("optimizer"):
            self.ema.update(step)
        return metrics

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[torch.Tensor, Conditioning, Draws, torch.Tensor]]:
        """Equally many on every rank, of equally many rows: a smaller share is filled up with rows of no weight.

        The engine takes the mean over rows, micro-batches and ranks; the weight makes of it that over the rows of the
        global batch, wherever a row is.
        """
        rows, device = self.engine.micro_batch, self.engine.device
        places = rows * self.engine.accumulation
        weight = places * dist.get_world_size() / self.global_batch
        weights = [weight * valid for valid in batch.valid] + [0.0] * (places - len(batch))
        index = [min(place, len(batch) - 1) for place in range(places)]
        for start in range(0, places, rows):
            chosen = index[start : start + rows]
            ids = [batch.sample_ids[row] for row in chosen]
            images = as_clean(_rows(batch.images, chosen), device)
            draws = self.objective.draw(self.seed, [batch.epochs[row] for row in chosen], ids, tuple(images.shape[1:]))
            captions = self.captions.rows(ids).where(draws.keep_caption, self.unconditional)
            yield (
                images,
                captions.to(device),
                draws.to(device),
                torch.tensor(weights[start : start + rows], device=device),
            )


def _rows(images: torch.Tensor, chosen: list[int]) -> torch.Tensor:
    """Some rows of a batch; a view where they lie side by side."""
    first, last = chosen[0], chosen[-1]
    return images[first : last + 1] if last - first + 1 == len(chosen) else images[chosen]


def as_clean(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What the loader delivers as what networks see: uint8 pixels become -1..1, and latents stay what they are.

    Returns:
        float32 on the device, of the shape of ``images``.
    """
    # bytes travel, a quarter of what floats would be, and while the device still works on what came before
    moved = images.to(device, non_blocking=True)
    values = moved.to(torch.float32, memory_format=torch.contiguous_format)
    return values.div_(127.5).sub_(1.0) if images.dtype == torch.uint8 else values
