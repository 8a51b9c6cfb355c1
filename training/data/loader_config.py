"""What a recipe says of its data."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class LoaderConfig(BaseModel):
    """Where training data comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = ""
    """The folder of a data set that ``darkroom data build`` made."""
    prefetch: int = Field(default=2, ge=1, le=64)
    """Batches decoded ahead of the one in use."""
    cache_mb: int = Field(default=256, ge=0)
    """Memory for decoded pictures, in megabytes per process; the first ones read stay. 0 decodes every time."""
