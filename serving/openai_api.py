"""OpenAI's Images dialect over the engine: generations and models."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from contextlib import aclosing
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from serving.config import LimitConfig
from serving.engine import Engine
from serving.envelope import ApiError, ErrorEnvelope
from serving.images import OutputFormat, encode_image, parameters_of
from serving.model import ModelCard
from serving.schemas import MAX_SEED, GenerationRequest, ImageReady, Queued

CLIENT_GONE = 499
"""Nobody reads this status: the client has closed the connection."""


class ImagesRequest(BaseModel):
    """The body of ``POST /v1/images/generations``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str
    """What the images show."""
    model: str | None = None
    """A model of ``GET /v1/models``; this server's own by default."""
    n: int = Field(default=1, ge=1)
    """How many images."""
    size: str = "auto"
    """``WIDTHxHEIGHT`` in pixels, or ``auto``: what the model was trained at."""
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    """Image i has seed + i; drawn at random where missing, and told in the response."""
    num_inference_steps: int | None = Field(default=None, ge=1)
    """Denoising steps."""
    guidance_scale: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    """How strongly the images follow the prompt; 1 is unguided."""
    negative_prompt: str = ""
    """What the images should not show."""
    response_format: Literal["b64_json"] = "b64_json"
    """How the images are sent."""
    output_format: OutputFormat = "png"
    """The images' file format."""
    user: str | None = None
    """The caller's name for its own user; not used."""


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


PARAMETERS = tuple(ImagesRequest.model_fields)
"""What a generation's body may hold."""
_ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorEnvelope} for status in (400, 404, 429, 500, 503)}


def openai_router(engine: Engine, card: ModelCard, limits: LimitConfig) -> APIRouter:
    """The routes of this dialect."""
    router = APIRouter(prefix="/v1", tags=["openai"], responses=_ERRORS)

    @router.post("/images/generations", response_model=ImagesResponse)
    async def generate(body: ImagesRequest, request: Request) -> Any:
        """Make images from a prompt."""
        _require_model(body.model, card)
        wanted = _to_request(body, card, limits)
        making = asyncio.create_task(_make(engine, wanted, body.output_format, card))
        leaving = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({making, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return making.result() if making.done() else Response(status_code=CLIENT_GONE)
        finally:
            making.cancel()
            leaving.cancel()

    @router.get("/models")
    async def list_models() -> ModelList:
        """The model that this server runs."""
        return ModelList(data=[_model(card, card.name)])

    @router.get("/models/{model_id:path}")
    async def get_model(model_id: str) -> Model:
        """One model."""
        _require_model(model_id, card)
        return _model(card, model_id)

    return router


def _model(card: ModelCard, name: str) -> Model:
    return Model(
        id=name,
        created=card.created,
        version=card.version,
        resolution=card.resolution,
        run_id=card.run_id,
        data_hash=card.data_hash,
    )


def _require_model(name: str | None, card: ModelCard) -> None:
    if name is not None and name not in card.names:
        message = f"The model '{name[:80]}' does not exist.\n  options: {', '.join(card.names)}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _to_request(body: ImagesRequest, card: ModelCard, limits: LimitConfig) -> GenerationRequest:
    """The engine's request, once the limits are kept.

    Raises:
        ApiError: a value is out of range; the message names value, rule and options.
    """
    steps = limits.default_steps if body.num_inference_steps is None else body.num_inference_steps
    scale = limits.default_guidance_scale if body.guidance_scale is None else body.guidance_scale
    seed = secrets.randbelow(2**32) if body.seed is None else body.seed
    for param, value, limit in (
        ("n", body.n, limits.max_images_per_request),
        ("num_inference_steps", steps, limits.max_steps),
        ("guidance_scale", scale, limits.max_guidance_scale),
        ("seed", seed, MAX_SEED - body.n + 1),
    ):
        if value > limit:
            raise _out_of_range(param, value, f"at most {limit}")
    for param, text in (("prompt", body.prompt), ("negative_prompt", body.negative_prompt)):
        if len(text) > limits.max_prompt_characters:
            raise _out_of_range(param, f"{len(text)} characters", f"at most {limits.max_prompt_characters} characters")
    return GenerationRequest(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        seed=seed,
        steps=steps,
        guidance_scale=scale,
        size=_side(body.size, card.resolution),
        images=body.n,
    )


def _side(size: str, resolution: int) -> int:
    """The side that ``size`` names; whether the model can make it is for the engine to say."""
    if size == "auto":
        return resolution
    width, _, height = size.partition("x")
    if width.isascii() and width.isdigit() and len(width) <= 5 and width == height and int(width):
        return int(width)
    raise ApiError(
        400,
        f"Invalid value for 'size'.\n  value:   {size[:80]!r}\n  rule:    WIDTHxHEIGHT in pixels, both the same\n"
        f"  options: {resolution}x{resolution}, auto",
        param="size",
        code="invalid_value",
    )


def _out_of_range(param: str, value: object, rule: str) -> ApiError:
    message = f"Invalid value for '{param}'.\n  value:   {value}\n  rule:    {rule}"
    return ApiError(400, message, param=param, code="invalid_value")


async def _make(
    engine: Engine, wanted: GenerationRequest, output_format: OutputFormat, card: ModelCard
) -> ImagesResponse:
    """Follow the engine's events to the whole answer; files are encoded off the loop."""
    images: dict[int, ImageData] = {}
    tokens = 0
    async with aclosing(engine.submit(wanted)) as events:
        async for event in events:
            if isinstance(event, Queued):
                tokens = event.prompt_tokens
            elif isinstance(event, ImageReady):
                parameters = parameters_of(wanted, seed=event.seed, model=card.names[-1])
                file = await asyncio.to_thread(encode_image, event.image, output_format, parameters)
                images[event.index] = ImageData(b64_json=base64.b64encode(file).decode(), seed=event.seed)
    return ImagesResponse(
        created=int(time.time()),
        data=[images[index] for index in sorted(images)],
        output_format=output_format,
        size=f"{wanted.size}x{wanted.size}",
        usage=Usage(input_tokens=tokens, input_tokens_details=TokenDetails(text_tokens=tokens), total_tokens=tokens),
    )


async def _disconnected(request: Request) -> None:
    """Returns when the client has gone; the body has been read already."""
    while (await request.receive())["type"] != "http.disconnect":
        continue
