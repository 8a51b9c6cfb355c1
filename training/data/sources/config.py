"""How a source is read."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from training.data.download_config import DownloadConfig
from training.data.rows import URL_FIELD


class SourceConfig(BaseModel):
    """How a source is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: str | None = None
    """Where a manifest's paths lead from: a folder, or a prefix of a bucket; by default, the manifest's own folder."""
    url_field: str = Field(default=URL_FIELD, min_length=1)
    """Where a manifest's row without a path has its picture's URL."""
    folder_labels: bool = True
    """Whether class folders become the field ``label`` and split folders ``split``, as in the Hugging Face
    ``imagefolder`` layout."""
    download: DownloadConfig = DownloadConfig()
    """How URLs are asked."""
