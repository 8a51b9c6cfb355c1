"""What a build is asked for."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator

from training.data.clean import CleanConfig
from training.data.decode import background_rgb
from training.data.normalise import OriginalStore, StoreConfig
from training.data.sources.config import SourceConfig


class BuildConfig(BaseModel):
    """How a source becomes a data set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    held_out: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the pictures kept away from training; each is assigned by its own bytes alone."""
    shard_mb: int = Field(default=64, ge=1, le=4096)
    """A shard is closed before it would exceed this many megabytes (10**6 bytes)."""
    background: str = "#ffffff"
    """The colour behind transparent pixels: a name or ``#rrggbb``; stored as ``#rrggbb``."""
    source: SourceConfig = SourceConfig()
    """How the source is read."""
    store: StoreConfig = OriginalStore()
    """What is written into the shards."""
    clean: CleanConfig = CleanConfig()
    """What a picture must be to be kept."""

    @field_validator("background")
    @classmethod
    def _colour(cls, name: str) -> str:
        red, green, blue = background_rgb(name)
        return f"#{red:02x}{green:02x}{blue:02x}"
