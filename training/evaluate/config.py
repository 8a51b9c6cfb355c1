"""What a recipe says of evaluation during training."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class EvaluationConfig(BaseModel):
    """What is measured and shown while training; always with the averaged weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    every_steps: int = Field(default=100, ge=1)
    """Steps between two evaluations; the last step is always evaluated."""
    held_out_images: int = Field(default=512, ge=1)
    """Held-out pictures that are measured, at most; spread over the split, and the same at every evaluation."""
    held_out_repeats: int = Field(default=8, ge=1)
    """Times and noises per held-out picture; more make the loss less noisy."""
    batch: int = Field(default=64, ge=1)
    """Pictures of one forward pass on one worker, of the held-out loss and of the contact sheet."""
    prompts: tuple[str, ...] = ()
    """Captions of the contact sheet. Empty takes captions of the data set, evenly spread."""
    images: int = Field(default=16, ge=0, le=256)
    """Pictures on the contact sheet; 0 makes none."""
    sample_steps: int = Field(default=20, ge=1, le=1000)
    """Denoising steps of each picture."""
    guidance_scale: float = Field(default=2.0, ge=1)
    """Classifier-free guidance; 1 is none."""
