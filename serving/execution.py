"""How an engine computes a picture: what its last bits depend on beside the request."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Execution(BaseModel):
    """Equal values give equal bits on equal hardware and software."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    padded_rows: int = Field(ge=1, le=100_000)
    """Rows of one call of the network."""
    precision: Literal["float32", "bfloat16"]
    """Of matrix products."""
    compiled: bool
    """Whether the network was compiled for its size."""
    step_cache: float = Field(ge=0, le=1, allow_inf_nan=False)
    """``speed.step_cache``: how small a foretold change was left out."""
    device: str
    """``cpu`` or ``cuda``."""
    threads: int = Field(ge=1, le=100_000)
    """Threads of tensor operations on the CPU."""
