"""What the recipes of all transformers of images say."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from training.models.mup import WidthTransfer


class TransformerConfig(WidthTransfer):
    """Patches of a picture as tokens."""

    WIDTHS: ClassVar[tuple[str, ...]] = ("heads",)

    resolution: int = Field(default=32, ge=8, le=2048)
    """Side of the square images, in pixels."""
    patch: int = Field(default=2, ge=1, le=16)
    """Side of a patch, in pixels or in values of a latent; a patch is a token."""
    layers: int = Field(default=6, ge=1, le=128)
    """Blocks."""
    heads: int = Field(default=6, ge=1, le=128)
    """Attention heads."""
    head_width: int = Field(default=64, ge=4, le=256)
    """Channels of a head."""

    @model_validator(mode="after")
    def _has_positions(self) -> TransformerConfig:
        if self.width % 4:
            raise ValueError(
                f"heads x head_width is {self.width} and must be a multiple of 4:"
                " positions are sines and cosines of two axes"
            )
        return self

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_width
