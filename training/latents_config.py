"""What a recipe says of latent space."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

StoredType = Literal["fp32", "bf16", "fp16"]
"""How numbers are kept: bf16 keeps 8 bits of each, fp16 11 (up to 65504), fp32 24."""


class LatentsConfig(BaseModel):
    """The frozen autoencoder whose latents stand for pictures."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    autoencoder: str = Field(min_length=1)
    """A directory with a diffusers ``AutoencoderKL`` or ``AutoencoderDC``: ``config.json`` and safetensors weights."""
    dtype: StoredType = "fp16"
    """How the latents' means and log-variances are kept."""
