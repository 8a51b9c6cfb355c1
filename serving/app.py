"""The application of one replica: an engine, its routes, its errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.types import ASGIApp

from serving import envelope
from serving.config import LimitConfig
from serving.engine import Engine
from serving.health import health_router
from serving.model import ModelCard
from serving.openai_api import PARAMETERS, openai_router


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
    app.include_router(health_router(engine, card))
    envelope.install(app, PARAMETERS)
    return app if behind_proxy else envelope.RequestIds(app)
