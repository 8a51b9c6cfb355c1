"""The application of one replica: an engine, its routes, its errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.types import ASGIApp

from serving import envelope
from serving.a1111_api import PREFIX, a1111_router, failure
from serving.body_limit import BodyLimit
from serving.config import LimitConfig
from serving.engine import Engine
from serving.health import health_router
from serving.model import ModelCard
from serving.openai_api import PARAMETERS, openai_router
from serving.openai_edits import edits_router
from serving.page import page_router
from serving.uploads import MAX_UPLOAD_BYTES

_BODY_BYTES = 1_000_000
"""Of JSON without pictures."""
_PICTURE_BODIES = {
    "/v1/images/edits": 2 * MAX_UPLOAD_BYTES + _BODY_BYTES,
    "/v1/images/variations": MAX_UPLOAD_BYTES + _BODY_BYTES,
    PREFIX: 4 * 2 * MAX_UPLOAD_BYTES // 3 + _BODY_BYTES,  # a picture and a mask in base64
}


def create_app(engine: Engine, card: ModelCard, limits: LimitConfig, *, behind_proxy: bool = False) -> ASGIApp:
    """The ASGI application; its lifespan starts and stops the engine.

    Args:
        engine: not started yet.
        card: the model that the engine runs.
        limits: what one request may ask for.
        behind_proxy: Serve's proxy names every response with ``x-request-id`` itself; a second one would join it.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with engine:
            yield

    app = FastAPI(title="Darkroom", summary="Images from text.", lifespan=lifespan)
    app.include_router(openai_router(engine, card, limits))
    app.include_router(edits_router(engine, card, limits))
    app.include_router(a1111_router(engine, card, limits))
    app.include_router(page_router())
    app.include_router(health_router(engine, card))
    app.add_middleware(BodyLimit, usual=_BODY_BYTES, larger=_PICTURE_BODIES)
    envelope.install(app, PARAMETERS, {PREFIX: failure})
    return app if behind_proxy else envelope.RequestIds(app)
