"""From a body in OpenAI's dialect to the engine's request: limits, sizes, models."""

from __future__ import annotations

import re

from serving import beside
from serving.config import LimitConfig
from serving.envelope import ApiError
from serving.model import ModelCard
from serving.openai_schemas import ImagesRequest
from serving.schemas import MAX_SEED, GenerationRequest, StartImage
from serving.seeds import draw_seed
from serving.sizes import Sizes

_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


def require_model(name: str | None, card: ModelCard) -> None:
    """Refuse a model that is not here.

    Raises:
        ApiError: naming those that are.
    """
    if name is not None and name not in card.names:
        options = ", ".join([*card.names, *beside.names()])
        message = f"The model '{name[:80]}' does not exist.\n  options: {options}"
        raise ApiError(404, message, param="model", code="model_not_found")


def to_request(
    body: ImagesRequest, card: ModelCard, limits: LimitConfig, start: StartImage | None = None
) -> GenerationRequest:
    """The engine's request, once the limits are kept.

    Raises:
        ApiError: a value is out of range; the message names value, rule and options.
    """
    steps = limits.default_steps if body.num_inference_steps is None else body.num_inference_steps
    scale = limits.default_guidance_scale if body.guidance_scale is None else body.guidance_scale
    seed = draw_seed() if body.seed is None else body.seed
    require_at_most(
        ("n", body.n, limits.max_images_per_request),
        ("num_inference_steps", steps, limits.max_steps),
        ("guidance_scale", scale, limits.max_guidance_scale),
        ("seed", seed, MAX_SEED - body.n + 1),
    )
    for param, text in (("prompt", body.prompt), ("negative_prompt", body.negative_prompt)):
        if len(text) > limits.max_prompt_characters:
            raise out_of_range(param, f"{len(text)} characters", f"at most {limits.max_prompt_characters} characters")
    if body.partial_images and not body.stream:
        raise out_of_range("partial_images", body.partial_images, "0, or stream: true")
    if body.output_format == "png" and body.output_compression not in {None, 100}:
        raise out_of_range("output_compression", body.output_compression, "webp or jpeg; a png is lossless")
    width, height = sides(body.size, card.sizes)
    return GenerationRequest(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        seed=seed,
        steps=steps,
        guidance_scale=scale,
        start=start,
        width=width,
        height=height,
        images=body.n,
        sampler=body.sampler,
        adapter=body.adapter,
        previews=body.partial_images,
    )


def sides(size: str, sizes: Sizes) -> tuple[int, int]:
    """The width and height that ``size`` names, in pixels.

    Raises:
        ApiError: it names none.
        RequestError: the model cannot make it.
    """
    if size == "auto":
        return sizes.default
    if (found := _SIZE.fullmatch(size)) is not None:
        width, height = int(found[1]), int(found[2])
        sizes.check(width, height)
        return width, height
    raise ApiError(
        400,
        f"Invalid value for 'size'.\n  value:   {size[:80]!r}\n  rule:    WIDTHxHEIGHT in pixels\n"
        f"  options: {', '.join(f'{width}x{height}' for width, height in sizes.trained)}, auto",
        param="size",
        code="invalid_value",
    )


def require_at_most(*limits: tuple[str, float, float]) -> None:
    """Keep limits, each a parameter's name, its value and the largest that is allowed.

    Raises:
        ApiError: the first one that is exceeded.
    """
    for param, value, limit in limits:
        if value > limit:
            raise out_of_range(param, value, f"at most {limit}")


def out_of_range(param: str, value: object, rule: str) -> ApiError:
    """The refusal of a value that no schema can know to be wrong."""
    message = f"Invalid value for '{param}'.\n  value:   {value}\n  rule:    {rule}"
    return ApiError(400, message, param=param, code="invalid_value")
