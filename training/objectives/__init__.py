"""Objectives: how a network is trained and how it becomes a denoiser; the union is the registry.

Samplers, evaluation and serving see only the denoiser, so training and serving cannot disagree about scaling,
prediction type or timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from training.objectives.base import Objective
from training.objectives.contract import Denoiser, Draws, Network, per_row
from training.objectives.edm import Edm
from training.objectives.noise_schedule import CosineNoise, LinearNoise, NoiseScheduleConfig
from training.objectives.rectified_flow import FlowDenoiser, RectifiedFlow
from training.objectives.variance_preserving import Epsilon, VPrediction

__all__ = [
    "CosineNoise",
    "Denoiser",
    "Draws",
    "Edm",
    "Epsilon",
    "FlowDenoiser",
    "LinearNoise",
    "Network",
    "NoiseScheduleConfig",
    "Objective",
    "ObjectiveConfig",
    "RectifiedFlow",
    "VPrediction",
    "per_row",
]


def _with_kind(value: Any) -> Any:
    """Rectified flow where a recipe names no kind."""
    return {"kind": "rectified_flow", **value} if isinstance(value, Mapping) else value


ObjectiveConfig = Annotated[
    RectifiedFlow | VPrediction | Epsilon | Edm, Field(discriminator="kind"), BeforeValidator(_with_kind)
]
"""Every objective; the union is the registry."""
