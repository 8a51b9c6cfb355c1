"""The exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch


class EmaConfig(BaseModel):
    """How long the average remembers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decay: float = Field(default=0.995, ge=0, lt=1)
    """Weight of the past at each step, once warm."""

    def decay_at(self, updates: int) -> float:
        """The decay for the update after ``updates`` others: short at first, so that the start is forgotten.

        ``min(decay, (1 + n) / (10 + n))``, as in TensorFlow's ExponentialMovingAverage(num_updates).
        """
        return min(self.decay, (1 + updates) / (10 + updates))


class Ema:
    """Averages the tensors that this rank owns; under ZeRO 3 these are its shards.

    Args:
        config: how long the average remembers.
        tensors: the live tensors; they are updated in place by the optimizer and read here.
    """

    def __init__(self, config: EmaConfig, tensors: Sequence[torch.Tensor]) -> None:
        self.config = config
        self.live = list(tensors)
        self.average = [tensor.detach().clone() for tensor in self.live]

    def update(self, updates: int) -> None:
        """Move the average towards the live weights, after the optimizer's step number ``updates``."""
        import torch

        weight = 1 - self.config.decay_at(updates)
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [tensor.detach() for tensor in self.live], weight)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the live tensors hold the average; afterwards the weights are back, bit for bit."""
        import torch

        with torch.no_grad():
            kept = [tensor.detach().clone() for tensor in self.live]
            for tensor, average in zip(self.live, self.average, strict=True):
                tensor.copy_(average)
            try:
                yield
            finally:
                for tensor, before in zip(self.live, kept, strict=True):
                    tensor.copy_(before)

    def restart(self) -> None:
        """Take the live weights as the average, after they were loaded."""
        for average, tensor in zip(self.average, self.live, strict=True):
            average.copy_(tensor.detach())
