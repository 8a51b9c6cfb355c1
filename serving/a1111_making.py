"""From a request in the A1111 dialect to its answer."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from contextlib import aclosing
from typing import Any

from fastapi import Request
from PIL import ImageOps

from serving.a1111_schemas import SAMPLERS, Images, ImageToImage, TextToImage
from serving.a1111_session import Making, Session
from serving.config import LimitConfig
from serving.disconnect import disconnected
from serving.engine import Engine
from serving.images import encode_image, parameters_of
from serving.infotext import LABELS, to_infotext
from serving.model import ModelCard
from serving.openai_request import out_of_range, require_at_most
from serving.schemas import MAX_SEED, GenerationRequest, ImageReady, Preview, Progress, StartImage
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
    seed = secrets.randbelow(2**32) if body.seed == -1 else body.seed
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
    for param, side in (("width", body.width), ("height", body.height)):
        if side not in {None, card.resolution}:
            raise out_of_range(param, side, f"{card.resolution}, the size that the model was trained at")
    for param, accepted in _REFUSED.items():
        if getattr(body, param) not in {accepted, ""}:
            raise out_of_range(param, getattr(body, param), f"{accepted}: this server has nothing of the kind")
    label = body.sampler_name or body.sampler_index or "Euler"
    if label.lower() not in SAMPLERS:
        raise out_of_range("sampler_name", label[:80], f"one of {', '.join(LABELS.values())}")
    return GenerationRequest(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        seed=seed,
        steps=steps,
        guidance_scale=scale,
        sampler=SAMPLERS[label.lower()],
        size=card.resolution,
        start=_start(body, card) if isinstance(body, ImageToImage) else None,
        images=images,
        previews=_PREVIEWS,
    )


def _start(body: ImageToImage, card: ModelCard) -> StartImage:
    if len(body.init_images) > 1:
        raise out_of_range("init_images", f"{len(body.init_images)} pictures", "one: this model reads no more")
    size = card.resolution
    picture = read_picture(from_base64(body.init_images[0], param="init_images"), param="init_images", size=size)
    mask = None
    if body.mask:
        mask = read_picture(from_base64(body.mask, param="mask"), param="mask", size=size)[0].convert("L")
        mask = ImageOps.invert(mask) if body.inpainting_mask_invert else mask
    return start_image(picture, mask, body.denoising_strength)


async def make(
    engine: Engine, session: Session, wanted: GenerationRequest, body: TextToImage, card: ModelCard, request: Request
) -> Images:
    """Follow the engine's events to the whole answer; an interruption, or a client that leaves, ends it early."""
    making = Making(wanted)
    files: dict[int, tuple[str, dict[str, object]]] = {}
    with session.enter(making):
        following = asyncio.create_task(_follow(engine, making, card, files))
        ending = [asyncio.create_task(making.interrupted.wait()), asyncio.create_task(disconnected(request))]
        try:
            await asyncio.wait({following, *ending}, return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                following.result()
        finally:
            for task in (following, *ending):
                task.cancel()
            await asyncio.wait([following])  # its rows are free and its files complete before the answer is made
    return _answer(wanted, body, [files[index] for index in sorted(files)])


async def _follow(
    engine: Engine, making: Making, card: ModelCard, files: dict[int, tuple[str, dict[str, object]]]
) -> None:
    async with aclosing(engine.submit(making.wanted)) as events:
        async for event in events:
            if isinstance(event, Progress):
                making.steps[event.index] = event.step
            elif isinstance(event, Preview):
                making.preview = event.image
            elif isinstance(event, ImageReady):
                parameters = parameters_of(making.wanted, seed=event.seed, model=card.names[-1])
                file = await asyncio.to_thread(encode_image, event.image, "png", parameters)
                files[event.index] = base64.b64encode(file).decode(), parameters


def _answer(wanted: GenerationRequest, body: TextToImage, files: list[tuple[str, dict[str, object]]]) -> Images:
    texts = [to_infotext(parameters) for _, parameters in files]
    seeds = [parameters["seed"] for _, parameters in files]
    info: dict[str, Any] = {
        "prompt": wanted.prompt,
        "negative_prompt": wanted.negative_prompt,
        "seed": wanted.seed,
        "all_seeds": seeds,
        "steps": wanted.steps,
        "cfg_scale": wanted.guidance_scale,
        "sampler_name": LABELS[wanted.sampler],
        "width": wanted.size,
        "height": wanted.size,
        "infotexts": texts,
        "ignored": sorted(body.model_extra or {}),
    }
    images = [file for file, _ in files] if body.send_images else []
    shown = set(type(body).model_fields)  # what is ignored can be anything, and is named only
    if not (isinstance(body, ImageToImage) and body.include_init_images):
        shown -= {"init_images", "mask"}
    taken = {"seed": wanted.seed, "steps": wanted.steps, "cfg_scale": wanted.guidance_scale}
    return Images(images=images, parameters=body.model_dump(include=shown) | taken, info=json.dumps(info))
