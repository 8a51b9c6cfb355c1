"""The A1111 web UI's API over the engine, for the design tools whose plugins speak it."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from PIL import Image

from serving.a1111_making import make, to_request
from serving.a1111_schemas import (
    ALIASES,
    Failure,
    Images,
    ImageToImage,
    PngInfo,
    PngInfoRequest,
    Progress,
    TextToImage,
)
from serving.a1111_session import Session
from serving.config import LimitConfig
from serving.envelope import ApiError
from serving.images import PARAMETERS_KEY, read_words
from serving.infotext import KEY, LABELS, from_infotext
from serving.model import ModelCard
from serving.studio import Studio
from serving.uploads import beside_loop, checked_header, from_base64

PREFIX = "/sdapi/v1"
_ABSENT = ("/upscalers", "/latent-upscale-modes", "/hypernetworks", "/prompt-styles", "/sd-vae")
"""Lists that clients ask for and that are empty here."""


def a1111_router(studio: Studio, card: ModelCard, limits: LimitConfig) -> APIRouter:
    """The routes of this dialect. Progress and interruption are of this replica's requests."""
    router = APIRouter(prefix=PREFIX, tags=["a1111"])
    session = Session()

    @router.post("/txt2img")
    async def txt2img(body: TextToImage, request: Request) -> Images:
        """Make images from a prompt."""
        return await make(studio, session, to_request(body, card, limits), body, request)

    @router.post("/img2img")
    async def img2img(body: ImageToImage, request: Request) -> Images:
        """Make images from a picture and a prompt."""
        wanted = await beside_loop(to_request, body, card, limits)
        return await make(studio, session, wanted, body, request)

    @router.get("/progress")
    async def progress(skip_current_image: bool = False) -> Progress:
        """How far the oldest request is."""
        return await _progress(session, with_image=not skip_current_image)

    @router.post("/interrupt")
    @router.post("/skip")
    async def interrupt() -> dict[str, Any]:
        """End what is being made; the requests answer with the images that they have."""
        session.interrupt()
        return {}

    router.include_router(_facts(card))
    return router


def _facts(card: ModelCard) -> APIRouter:
    """What this server has."""
    router = APIRouter()

    @router.get("/samplers")
    async def samplers() -> list[dict[str, Any]]:
        """The samplers."""
        return [{"name": label, "aliases": [name, *ALIASES[name]], "options": {}} for name, label in LABELS.items()]

    @router.get("/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        """The one schedule of times: the model's own."""
        return [
            {"name": "automatic", "label": "Automatic", "aliases": None, "default_rho": -1, "need_inner_model": False}
        ]

    @router.get("/sd-models")
    async def models() -> list[dict[str, Any]]:
        """The one model."""
        sha256 = card.bundle_sha256
        title = f"{card.names[-1]} [{sha256[:10]}]"
        names = {"title": title, "model_name": card.names[-1], "filename": card.names[-1]}
        return [{**names, "hash": sha256[:10], "sha256": sha256, "config": None}]

    for absent in _ABSENT:
        router.add_api_route(absent, _nothing, methods=["GET"], operation_id=f"a1111{absent.replace('-', '_')}")

    @router.get("/loras")
    async def loras() -> list[dict[str, Any]]:
        """The adapters beside the model."""
        return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in card.adapters]

    @router.get("/scripts")
    async def scripts() -> dict[str, list[str]]:
        """No extensions."""
        return {"txt2img": [], "img2img": []}

    @router.get("/options")
    async def options() -> dict[str, Any]:
        """The settings that clients read."""
        return {
            "sd_model_checkpoint": card.names[-1],
            "sd_checkpoint_hash": card.bundle_sha256,
            "samples_format": "png",
        }

    @router.post("/options")
    async def set_options(body: dict[str, Any]) -> dict[str, Any]:
        """Choosing the model that runs already is all that can be set."""
        for name, value in body.items():
            chosen = str(value).split(" [")[0]
            if name != "sd_model_checkpoint" or chosen not in card.names:
                options = f"sd_model_checkpoint: {', '.join(card.names)}"
                message = f"This cannot be set.\n  value:   {name[:80]} = {str(value)[:80]!r}\n  options: {options}"
                raise ApiError(400, message, param=name[:80], code="invalid_value")
        return {}

    @router.post("/png-info")
    async def png_info(body: PngInfoRequest) -> PngInfo:
        """What a picture says about itself."""
        return await beside_loop(_png_info, body.image)

    return router


async def _nothing() -> list[Any]:
    """Nothing of the kind."""
    return []


def failure(error: ApiError) -> JSONResponse:
    """An error in this dialect's own shape."""
    message = error.body.message
    told = Failure(
        error=error.body.code or error.body.type, detail=message, errors=message, body=error.body.param or ""
    )
    return JSONResponse(told.model_dump(), status_code=error.status, headers=error.headers)


def _png_info(image: str) -> PngInfo:
    header = checked_header(from_base64(image, param="image"), param="image")
    items = {name: value for name, value in header.info.items() if isinstance(name, str) and isinstance(value, str)}
    words = read_words(header)
    items |= {name: text for name, text in ((KEY, words.infotext), (PARAMETERS_KEY, words.json)) if text}
    return PngInfo(info=words.infotext, items=items, parameters=from_infotext(words.infotext) if words.infotext else {})


async def _progress(session: Session, *, with_image: bool) -> Progress:
    making = session.oldest
    state = {"job_count": session.count, "interrupted": bool(making and making.interrupted.is_set())}
    if making is None:
        return Progress(progress=0.0, eta_relative=0.0, state={**state, "sampling_step": 0, "sampling_steps": 0})
    state |= {"sampling_step": min(making.steps.values(), default=0), "sampling_steps": making.of}
    image = await asyncio.to_thread(_encoded, making.preview) if with_image and making.preview else None
    return Progress(progress=making.share, eta_relative=making.seconds_left, state=state, current_image=image)


def _encoded(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
