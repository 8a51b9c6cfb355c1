"""How the weights move: optimizers, and the schedules of their learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from training.optim.adafactor import AdafactorConfig
from training.optim.adamw import AdamWConfig
from training.optim.muon import MuonConfig
from training.optim.schedule_free import ScheduleFreeConfig
from training.optim.schedules import ConstantSchedule, CosineSchedule, ScheduleConfig, WarmupStableDecay


def _with_kind(value: Any) -> Any:
    """AdamW where a recipe names no kind."""
    return {"kind": "adamw", **value} if isinstance(value, Mapping) else value


OptimizerConfig = Annotated[
    AdamWConfig | AdafactorConfig | ScheduleFreeConfig | MuonConfig,
    Field(discriminator="kind"),
    BeforeValidator(_with_kind),
]
"""Every optimizer; the union is the registry."""

__all__ = [
    "AdafactorConfig",
    "AdamWConfig",
    "ConstantSchedule",
    "CosineSchedule",
    "MuonConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "ScheduleFreeConfig",
    "WarmupStableDecay",
]
