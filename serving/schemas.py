"""What the engine is asked and what it answers; no HTTP and, towards its callers, no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, Field

from training.sampling_config import SamplerName

MAX_SEED = 2**53 - 1
"""The largest seed: every JSON reader keeps it exactly."""


@dataclass(frozen=True)
class StartImage:
    """A picture to start from instead of noise.

    Attributes:
        image: RGB, of the request's size.
        strength: 0..1, how much of the way from noise is taken; 1 forgets the picture.
        mask: mode ``L``, 255 where it may change and 0 where it is kept; None lets all of it change.
    """

    image: Image
    strength: float
    mask: Image | None = None


class GenerationRequest(BaseModel):
    """Images to make from one prompt. Image ``i`` depends on these fields and on ``i`` alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

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
    sampler: SamplerName = "euler"
    """How a picture is denoised; see ``training.samplers``."""
    width: int = Field(ge=1)
    """Of the images, in pixels."""
    height: int = Field(ge=1)
    """Of the images, in pixels."""
    adapter: str | None = None
    """A LoRA by the name that the server gives it; None is the model alone."""
    start: StartImage | None = None
    """A picture to start from; None starts from noise."""
    images: int = Field(default=1, ge=1)
    """How many images."""
    previews: int = Field(default=0, ge=0)
    """Previews of each image on its way, evenly spread over its steps; they change nothing about it."""
    deadline_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds from acceptance after which nobody wants the images any more; None waits as long as it takes."""
    priority: int = Field(default=5, ge=0, le=9)
    """Whose turn it is where not all can be made at once: 0 is the most urgent."""

    @property
    def steps_left(self) -> int:
        """The steps that are taken: from a given picture, its strength's share of them, at least one."""
        return self.steps if self.start is None else max(1, round(self.start.strength * self.steps))

    @property
    def size(self) -> str:
        """``WIDTHxHEIGHT``."""
        return f"{self.width}x{self.height}"


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
class Preview:
    """What image ``index`` is expected to become, as predicted at one of its steps.

    Attributes:
        index: which of the request's images, from 0.
        number: which of its previews, from 0.
        image: RGB picture.
    """

    index: int
    number: int
    image: Image


@dataclass(frozen=True)
class ImageReady:
    """Image ``index`` is finished.

    Attributes:
        index: which of the request's images, from 0.
        seed: the seed that makes this image alone.
        image: RGB picture.
        padded_rows: rows of the network's calls that made it: its last bits are of this width.
    """

    index: int
    seed: int
    image: Image
    padded_rows: int


Event = Queued | Progress | Preview | ImageReady
"""What a submitted request tells its caller, in order of time."""
