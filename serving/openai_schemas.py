"""What OpenAI's Images dialect sends and gets: the bodies of generations and models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from serving.images import OutputFormat
from serving.schemas import MAX_SEED
from training.sampling_config import SamplerName


def _encodable(text: str) -> str:
    """JSON can spell half a character; tokenizers, files and answers cannot hold one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"whole Unicode characters; the one at {error.start} is half a surrogate pair") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]
"""Text that UTF-8 can encode."""


StreamKind = Literal["image_generation", "image_edit"]
"""How a stream's events are called."""
MAX_PARTIAL_IMAGES = 3
"""As OpenAI has it."""


def null_is_default(body: Any) -> Any:
    """A body without its nulls."""
    return {key: value for key, value in body.items() if value is not None} if isinstance(body, dict) else body


class ImagesRequest(BaseModel):
    """The body of ``POST /v1/images/generations``; null means the default, as OpenAI's clients expect.

    What OpenAI defines and this server would disobey is refused: links, transparency, qualities.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Text
    """What the images show."""
    model: Text | None = None
    """A model of ``GET /v1/models``; this server's own by default."""
    n: int = Field(default=1, ge=1)
    """How many images."""
    size: Text = "auto"
    """``WIDTHxHEIGHT`` in pixels, or ``auto``: what the model was trained at."""
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    """Image i has seed + i; drawn at random where missing, and told in the response."""
    num_inference_steps: int | None = Field(default=None, ge=1)
    """Denoising steps."""
    guidance_scale: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    """How strongly the images follow the prompt; 1 is unguided."""
    negative_prompt: Text = ""
    """What the images should not show."""
    sampler: SamplerName = "euler"
    """How an image is denoised."""
    adapter: Text | None = None
    """A LoRA that this server has beside its model, by name."""
    response_format: Literal["b64_json"] = "b64_json"
    """How the images are sent: inside the answer, never as links."""
    output_format: OutputFormat = "png"
    """The images' file format."""
    output_compression: int | None = Field(default=None, ge=0, le=100)
    """Quality of a lossy file; without it WebP is lossless and JPEG 95. A PNG is always lossless: 100 or nothing."""
    stream: bool = False
    """Send each image when it is ready, as server-sent events."""
    partial_images: int = Field(default=0, ge=0, le=MAX_PARTIAL_IMAGES)
    """Previews of each image on its way; for a stream only."""
    background: Literal["auto", "opaque"] = "auto"
    """Images have no transparency."""
    quality: Literal["auto", "standard"] = "auto"
    """The one that there is; more or less work is asked for with ``num_inference_steps``."""
    style: Literal["vivid", "natural"] | None = None
    """Taken and ignored: a hint of one of OpenAI's models; the prompt alone decides."""
    moderation: Literal["auto", "low"] = "auto"
    """Taken and ignored: nothing is moderated here."""
    user: Text | None = None
    """The caller's name for its own user; taken and ignored."""
    safety_identifier: Text | None = None
    """The same under its newer name; taken and ignored."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, body: Any) -> Any:
        return null_is_default(body)


class ImageData(BaseModel):
    """One image."""

    b64_json: str
    """The file, base64."""
    revised_prompt: str | None = None
    """Always null: prompts are taken as they are."""
    seed: int
    """The seed that makes this image alone."""


class TokenDetails(BaseModel):
    """What the input tokens were."""

    text_tokens: int
    """Tokens of the prompt."""
    image_tokens: int = 0
    """Always 0: no image goes in."""


class Usage(BaseModel):
    """Tokens, as OpenAI counts them."""

    input_tokens: int
    """Tokens of the prompt."""
    input_tokens_details: TokenDetails
    """The same by kind."""
    output_tokens: int = 0
    """Always 0: diffusion makes no tokens."""
    total_tokens: int
    """Their sum."""


class ImagesResponse(BaseModel):
    """The answer to ``POST /v1/images/generations``."""

    created: int
    """Seconds since 1970."""
    data: list[ImageData]
    """The images, in order of their seeds."""
    output_format: OutputFormat
    """The images' file format."""
    size: str
    """``WIDTHxHEIGHT`` in pixels."""
    usage: Usage
    """Tokens read."""


class Model(BaseModel):
    """One entry of ``GET /v1/models``."""

    id: str
    """What a request's ``model`` says."""
    object: Literal["model"] = "model"
    """Always ``model``."""
    created: int
    """Seconds since 1970."""
    owned_by: str = "darkroom"
    """Always ``darkroom``."""
    version: int | None
    """The registry's version; null for a directory."""
    resolution: int
    """Side of its square images, in pixels."""
    run_id: str | None
    """The MLflow run that trained it."""
    data_hash: str | None
    """The data set that it learned from."""


class ModelList(BaseModel):
    """The answer to ``GET /v1/models``."""

    object: Literal["list"] = "list"
    """Always ``list``."""
    data: list[Model]
    """The models."""


class StreamedImage(BaseModel):
    """What every event of a stream tells of its image."""

    b64_json: str
    """The file, base64."""
    image_index: int
    """Which image of the request, from 0."""
    created_at: int
    """Seconds since 1970."""
    output_format: OutputFormat
    """The file's format."""
    size: str
    """``WIDTHxHEIGHT`` in pixels."""
    background: Literal["opaque"] = "opaque"
    """Images have no transparency."""
    quality: Literal["auto"] = "auto"
    """The one that there is."""


class PartialImageEvent(StreamedImage):
    """A preview in a stream."""

    type: str
    """Also the event's name: ``image_generation.partial_image`` or ``image_edit.partial_image``."""
    partial_image_index: int
    """Which preview of its image, from 0."""


class CompletedEvent(StreamedImage):
    """A finished image in a stream."""

    type: str
    """Also the event's name: ``image_generation.completed`` or ``image_edit.completed``."""
    seed: int
    """The seed that makes this image alone."""
    usage: Usage
    """Tokens read."""
