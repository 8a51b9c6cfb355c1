"""From a request in the A1111 dialect to its answer."""

from __future__ import annotations

import asyncio
import base64
import json
from contextlib import aclosing
from typing import Any

from fastapi import Request
from PIL import ImageOps

from serving.a1111_lora import without_lora
from serving.a1111_schemas import SAMPLERS, Images, ImageToImage, TextToImage
from serving.a1111_session import Making, Session
from serving.config import LimitConfig
from serving.disconnect import disconnected
from serving.infotext import LABELS
from serving.model import ModelCard
from serving.openai_request import out_of_range, require_at_most
from serving.schemas import MAX_SEED, GenerationRequest, ImageReady, Preview, Progress, StartImage
from serving.seeds import draw_seed
from serving.sizes import Sizes
from serving.studio import Picture, Studio
from serving.uploads import from_base64, read_picture, start_image

_PREVIEWS = 8
"""Previews of each image, for ``progress``."""
_STEPS = 50
_CFG_SCALE = 7.0
"""The UI's own, where the request names none and the limits allow them."""
_REFUSED = {"enable_hr": False, "script_name": None}
"""What would be disobeyed unless it has this value."""


def to_request(body: TextToImage, card: ModelCard, limits: LimitConfig) -> GenerationRequest:
    """The engine's request, once the limits are kept.

    Raises:
        ApiError: a value is out of range.
        RequestError: a picture is refused.
    """
    images = body.batch_size * body.n_iter
    seed = draw_seed() if body.seed == -1 else body.seed
    steps = min(_STEPS, limits.max_steps) if body.steps is None else body.steps
    scale = min(_CFG_SCALE, limits.max_guidance_scale) if body.cfg_scale is None else body.cfg_scale
    require_at_most(
        ("steps", steps, limits.max_steps),
        ("cfg_scale", scale, limits.max_guidance_scale),
        ("batch_size", images, limits.max_images_per_request),
        ("seed", seed, MAX_SEED - images + 1),
        ("prompt", len(body.prompt), limits.max_prompt_characters),
        ("negative_prompt", len(body.negative_prompt), limits.max_prompt_characters),
    )
    for param, accepted in _REFUSED.items():
        if getattr(body, param) not in {accepted, ""}:
            raise out_of_range(param, getattr(body, param), f"{accepted}: this server has nothing of the kind")
    label = body.sampler_name or body.sampler_index or "Euler"
    if label.lower() not in SAMPLERS:
        raise out_of_range("sampler_name", label[:80], f"one of {', '.join(LABELS.values())}")
    width, height = _sides(body, card.sizes)
    prompt, adapter = without_lora(body.prompt)
    return GenerationRequest(
        prompt=prompt,
        adapter=adapter,
        negative_prompt=body.negative_prompt,
        seed=seed,
        steps=steps,
        guidance_scale=scale,
        sampler=SAMPLERS[label.lower()],
        width=width,
        height=height,
        start=_start(body, (width, height)) if isinstance(body, ImageToImage) else None,
        images=images,
        previews=_PREVIEWS,
    )


def _sides(body: TextToImage, sizes: Sizes) -> tuple[int, int]:
    """Width and height; one that is missing is the model's own."""
    width = sizes.default[0] if body.width is None else body.width
    height = sizes.default[1] if body.height is None else body.height
    odd = {size[0] for size in sizes.trained}.isdisjoint({width})
    sizes.check(width, height, param="width" if odd else "height")
    return width, height


def _start(body: ImageToImage, size: tuple[int, int]) -> StartImage:
    if len(body.init_images) > 1:
        raise out_of_range("init_images", f"{len(body.init_images)} pictures", "one: this model reads no more")
    picture = read_picture(from_base64(body.init_images[0], param="init_images"), param="init_images", size=size)
    mask = None
    if body.mask:
        mask = read_picture(from_base64(body.mask, param="mask"), param="mask", size=size)[0].convert("L")
        mask = ImageOps.invert(mask) if body.inpainting_mask_invert else mask
    return start_image(picture, mask, body.denoising_strength)


async def make(
    studio: Studio, session: Session, wanted: GenerationRequest, body: TextToImage, request: Request
) -> Images:
    """Follow the engine's events to the whole answer; an interruption, or a client that leaves, ends it early."""
    making = Making(wanted)
    made: dict[int, Picture] = {}
    with session.enter(making):
        following = asyncio.create_task(_follow(studio, making, made))
        ending = [asyncio.create_task(making.interrupted.wait()), asyncio.create_task(disconnected(request))]
        try:
            await asyncio.wait({following, *ending}, return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                following.result()
        finally:
            for task in (following, *ending):
                task.cancel()
            await asyncio.wait([following])  # its rows are free and its files complete before the answer is made
    return _answer(wanted, body, [made[index] for index in sorted(made)])


async def _follow(studio: Studio, making: Making, made: dict[int, Picture]) -> None:
    async with aclosing(studio.submit(making.wanted)) as events:
        async for event in events:
            if isinstance(event, Progress):
                making.steps[event.index] = event.step
            elif isinstance(event, Preview):
                making.preview = event.image
            elif isinstance(event, ImageReady):
                made[event.index] = await studio.file(event, making.wanted, "png")


def _answer(wanted: GenerationRequest, body: TextToImage, made: list[Picture]) -> Images:
    info: dict[str, Any] = {
        "prompt": wanted.prompt,
        "negative_prompt": wanted.negative_prompt,
        "seed": wanted.seed,
        "all_seeds": [picture.parameters.seed for picture in made],
        "steps": wanted.steps,
        "cfg_scale": wanted.guidance_scale,
        "sampler_name": LABELS[wanted.sampler],
        "width": wanted.width,
        "height": wanted.height,
        "infotexts": [picture.infotext for picture in made],
        "ignored": sorted(body.model_extra or {}),
    }
    images = [base64.b64encode(picture.file).decode() for picture in made] if body.send_images else []
    shown = set(type(body).model_fields)  # what is ignored can be anything, and is named only
    if not (isinstance(body, ImageToImage) and body.include_init_images):
        shown -= {"init_images", "mask"}
    taken = {"seed": wanted.seed, "steps": wanted.steps, "cfg_scale": wanted.guidance_scale}
    return Images(images=images, parameters=body.model_dump(include=shown) | taken, info=json.dumps(info))
