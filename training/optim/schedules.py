"""Learning-rate schedules: shares of the peak rate."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class ConstantSchedule(BaseModel):
    """Linear warm-up, then the peak rate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["constant"] = "constant"
    """Chooses this schedule."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps until the peak rate."""

    def factor(self, step: int, steps: int) -> float:  # noqa: ARG002  the schedules' common signature
        """The share of the peak rate at ``step`` (0-based) of ``steps``."""
        return _warmup(step, self.warmup_steps)


class CosineSchedule(BaseModel):
    """Linear warm-up, then half a cosine down to ``floor`` (Loshchilov and Hutter 2017, eq. 5, no restarts)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["cosine"] = "cosine"
    """Chooses this schedule."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps until the peak rate."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """Share of the peak rate at the end."""

    def factor(self, step: int, steps: int) -> float:
        """The share of the peak rate at ``step`` (0-based) of ``steps``."""
        progress = min(1.0, step / max(1, steps))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return _warmup(step, self.warmup_steps) * (self.floor + (1 - self.floor) * cosine)


class WarmupStableDecay(BaseModel):
    """Warm-up, a stable stretch, then a linear decay to ``floor`` (Hu et al. 2024, MiniCPM, eq. 1)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["wsd"] = "wsd"
    """Chooses this schedule."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps until the peak rate."""
    decay_share: float = Field(default=0.4, ge=0, le=1)
    """Share of all steps spent decaying, at the end."""
    floor: float = Field(default=0.02, ge=0, le=1)
    """Share of the peak rate at the end."""

    def factor(self, step: int, steps: int) -> float:
        """The share of the peak rate at ``step`` (0-based) of ``steps``."""
        decay_steps = self.decay_share * steps
        left = min(1.0, (steps - step) / decay_steps) if decay_steps else 1.0
        return _warmup(step, self.warmup_steps) * (self.floor + (1 - self.floor) * max(0.0, left))


ScheduleConfig = Annotated[ConstantSchedule | CosineSchedule | WarmupStableDecay, Field(discriminator="kind")]
"""Every schedule; the union is the registry."""


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / (warmup_steps + 1))
