"""What a recipe says of its data."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from training.data.augment import AugmentConfig
from training.data.buckets import BucketsConfig
from training.data.disk_cache import DiskCacheConfig
from training.data.order import BLOCK, WINDOW


class LoaderConfig(BaseModel):
    """Where training data comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = ""
    """The folder or URL of a data set that ``darkroom data build`` made, or of WebDataset shards that others made."""
    disk_cache: DiskCacheConfig = DiskCacheConfig()
    """What each node keeps on its own disk of a data set that lies behind a network."""
    block: int = Field(default=BLOCK, ge=1, le=1 << 20)
    """Consecutive samples of a shard that are read at about the same time, so that reads stay local; 1 shuffles all."""
    window: int = Field(default=WINDOW, ge=1, le=1 << 20)
    """Blocks whose samples are mixed. Two samples in a row are of one block with a chance of one in so many."""
    buckets: BucketsConfig = BucketsConfig()
    """The shapes that pictures are cut to; no batch holds two of them."""
    augment: AugmentConfig = AugmentConfig()
    """How pictures are varied from epoch to epoch."""
    scaled_decoding: bool = True
    """Decode JPEGs that are more than three times as large as wanted at a fraction of their size: twice as fast or
    more, and about as close to what was encoded."""
    prefetch: int = Field(default=2, ge=1, le=64)
    """Batches decoded ahead of the one in use."""
    threads: int = Field(default=0, ge=0, le=256)
    """Threads that read and decode, in each process; 0 for one per core. More where reads wait for a network."""
    cache_mb: int = Field(default=256, ge=0)
    """Memory for decoded pictures, in megabytes per process; the first ones read stay. 0 decodes every time."""
