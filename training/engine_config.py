"""What a recipe says of DeepSpeed's engine and of Ray Train's workers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class EngineConfig(BaseModel):
    """DeepSpeed's engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What is sharded over the workers: 1 optimizer state, 2 and gradients, 3 and weights (Rajbhandari et al. 2020)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the matrix products; auto is bf16 where every worker's hardware has it, fp32 elsewhere. Master
    weights, their gradients and the optimizer stay fp32."""
    gradient_clip: float = Field(default=1.0, ge=0)
    """Largest norm of the whole gradient; 0 never clips."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Rows of one forward on one worker; the rest is accumulated. None takes a worker's whole share."""


class WorkersConfig(BaseModel):
    """Ray Train's worker group."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(default=1, ge=1)
    """Training processes, one per worker."""
    cpus: float = Field(default=0.9, gt=0)
    """Ray CPUs that a worker reserves. Below 1, so that two workers and a sweep's driver fit on two cores."""
    gpus: float = Field(default=0.0, ge=0)
    """Ray GPUs that a worker reserves."""
    threads: int = Field(default=1, ge=1)
    """torch's threads in each training process."""
    max_failures: int = Field(default=3, ge=0)
    """How often a lost worker group is started again from the last checkpoint."""
