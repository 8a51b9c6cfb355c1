"""What a data set is built from: files, shards, manifests and URLs, as one stream of inputs."""

from training.data.sources.config import SourceConfig
from training.data.sources.item import Item
from training.data.sources.opening import open_source
from training.data.sources.source import Source

__all__ = ["Item", "Source", "SourceConfig", "open_source"]
