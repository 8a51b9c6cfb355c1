"""What the A1111 web UI's API sends and gets, as far as a text-to-image model can answer it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serving.infotext import LABELS
from serving.openai_schemas import Text, null_is_default
from training.sampling_config import SamplerName

ALIASES: dict[SamplerName, tuple[str, ...]] = {
    "euler": ("k_euler", "ddim"),
    "heun": ("k_heun",),
    "dpmpp_2m": ("k_dpmpp_2m",),
    "ancestral": ("k_euler_a", "k_euler_ancestral"),
    "lcm": ("k_lcm",),
}
"""The UI's other names for its samplers, and DDIM, which is Euler's method."""
SAMPLERS: dict[str, SamplerName] = {
    spelling: name for name, label in LABELS.items() for spelling in (label.lower(), name, *ALIASES[name])
}
"""Every name under which a sampler may be asked for, in small letters."""


class TextToImage(BaseModel):
    """The body of ``POST /sdapi/v1/txt2img``; null means the default, as this dialect's clients expect.

    What it holds beyond these fields is ignored, and named in ``info``.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, body: Any) -> Any:
        return null_is_default(body)

    prompt: Text = ""
    """What the images show."""
    negative_prompt: Text = ""
    """What they should not show."""
    seed: int = Field(default=-1, ge=-1)
    """Image i has seed + i; -1 draws one."""
    steps: int | None = Field(default=None, ge=1)
    """Denoising steps; 50, or as many as the server allows, where missing."""
    cfg_scale: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    """Classifier-free guidance; 7, or as much as the server allows, where missing."""
    sampler_name: Text | None = None
    """One of ``GET /sdapi/v1/samplers``."""
    sampler_index: Text | None = None
    """The same under its older name."""
    width: int | None = Field(default=None, ge=1)
    """Pixels; the model's own where missing."""
    height: int | None = Field(default=None, ge=1)
    """Pixels; the model's own where missing."""
    batch_size: int = Field(default=1, ge=1)
    """Images of one batch."""
    n_iter: int = Field(default=1, ge=1)
    """Batches."""
    send_images: bool = True
    """Whether the answer holds the images."""
    enable_hr: bool = False
    """A second pass at a higher resolution: refused, this model has one size."""
    script_name: Text | None = None
    """A script of the UI: refused, there are none."""


class ImageToImage(TextToImage):
    """The body of ``POST /sdapi/v1/img2img``."""

    init_images: list[str] = Field(min_length=1)
    """Pictures in base64; one."""
    mask: str | None = None
    """A picture in base64, white where the image may change."""
    inpainting_mask_invert: int = Field(default=0, ge=0, le=1)
    """1 where the mask is white where the image is kept."""
    denoising_strength: float = Field(default=0.75, gt=0, le=1, allow_inf_nan=False)
    """How much of the way from noise is taken."""
    include_init_images: bool = False
    """Whether the answer repeats the pictures that were sent."""


class Images(BaseModel):
    """The answer to both."""

    images: list[str]
    """PNG files in base64."""
    parameters: dict[str, Any]
    """What was asked."""
    info: str
    """JSON: seeds, the text inside each file, and the names of fields that were ignored."""


class Failure(BaseModel):
    """Every response that is not a success."""

    error: str
    """A word for programs."""
    detail: str
    """One sentence; then value, rule and options, one a line."""
    errors: str
    """The same, under the name that other clients read."""
    body: str
    """The field of the request that is wrong, or nothing."""


class PngInfoRequest(BaseModel):
    """The body of ``POST /sdapi/v1/png-info``."""

    image: str
    """A picture in base64."""


class PngInfo(BaseModel):
    """What a picture says about itself."""

    info: str
    """The text of its ``parameters``; empty where it has none."""
    items: dict[str, str]
    """Its text chunks."""
    parameters: dict[str, str]
    """The settings in ``info``, by name."""


class Progress(BaseModel):
    """How far the oldest request is that this replica works on."""

    progress: float
    """0..1."""
    eta_relative: float
    """Seconds that are left, by the steps so far."""
    state: dict[str, Any]
    """Steps and jobs."""
    current_image: str | None = None
    """A preview in base64, where one was made."""
    textinfo: str | None = None
    """Nothing."""
