"""OpenAI's Images dialect over the engine: generations and models."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response

from serving.config import LimitConfig
from serving.engine import Engine
from serving.envelope import ApiError, ErrorEnvelope
from serving.images import encode_image, parameters_of
from serving.model import ModelCard
from serving.openai_schemas import ImageData, ImagesRequest, ImagesResponse, Model, ModelList, TokenDetails, Usage
from serving.schemas import MAX_SEED, GenerationRequest, ImageReady, Queued

CLIENT_GONE = 499
"""Nobody reads this status: the client has closed the connection."""

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
        making = asyncio.create_task(_make(engine, wanted, body, card))
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
    if body.output_format == "png" and body.output_compression not in {None, 100}:
        raise _out_of_range("output_compression", body.output_compression, "webp or jpeg; a png is lossless")
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


async def _make(engine: Engine, wanted: GenerationRequest, body: ImagesRequest, card: ModelCard) -> ImagesResponse:
    """Follow the engine's events to the whole answer; files are encoded off the loop."""
    images: dict[int, ImageData] = {}
    tokens = 0
    async with aclosing(engine.submit(wanted)) as events:
        async for event in events:
            if isinstance(event, Queued):
                tokens = event.prompt_tokens
            elif isinstance(event, ImageReady):
                parameters = parameters_of(wanted, seed=event.seed, model=card.names[-1])
                file = await asyncio.to_thread(
                    encode_image, event.image, body.output_format, parameters, quality=body.output_compression
                )
                images[event.index] = ImageData(b64_json=base64.b64encode(file).decode(), seed=event.seed)
    return ImagesResponse(
        created=int(time.time()),
        data=[images[index] for index in sorted(images)],
        output_format=body.output_format,
        size=f"{wanted.size}x{wanted.size}",
        usage=Usage(input_tokens=tokens, input_tokens_details=TokenDetails(text_tokens=tokens), total_tokens=tokens),
    )


async def _disconnected(request: Request) -> None:
    """Returns when the client has gone; the body has been read already."""
    while (await request.receive())["type"] != "http.disconnect":
        continue
