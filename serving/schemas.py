"""What the engine is asked and what it answers; no HTTP and, towards its callers, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SEED = 2**53 - 1
"""The largest seed: every JSON reader keeps it exactly."""


class GenerationRequest(BaseModel):
    """Images to make from one prompt. Image ``i`` depends on these fields and on ``i`` alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    """What the images show."""
    negative_prompt: str = ""
    """What guidance leads away from; empty is the unconditional caption."""
    seed: int = Field(ge=0, le=MAX_SEED)
    """Image ``i`` starts from the noise of ``seed + i``."""
    steps: int = Field(default=20, ge=1)
    """Denoising steps."""
    guidance_scale: float = Field(default=3.0, ge=1, allow_inf_nan=False)
    """Classifier-free guidance; 1 is unguided and costs half."""
    size: int = Field(ge=1)
    """Side of the square images, in pixels."""
    images: int = Field(default=1, ge=1)
    """How many images."""


@dataclass(frozen=True)
class Queued:
    """The request was accepted and encoded.

    Attributes:
        ahead: images of other requests that wait before it.
        prompt_tokens: tokens that the prompt was read as.
    """

    ahead: int
    prompt_tokens: int


@dataclass(frozen=True)
class Progress:
    """Image ``index`` has taken ``step`` of ``steps`` denoising steps."""

    index: int
    step: int
    steps: int


@dataclass(frozen=True)
class ImageReady:
    """Image ``index`` is finished.

    Attributes:
        index: which of the request's images, from 0.
        seed: the seed that makes this image alone.
        image: RGB picture.
    """

    index: int
    seed: int
    image: Image


Event = Queued | Progress | ImageReady
"""What a submitted request tells its caller, in order of time."""
