"""OpenAI's Images dialect over the engine: generations and models; edits are beside it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from serving.config import LimitConfig
from serving.envelope import ErrorEnvelope
from serving.model import ModelCard
from serving.openai_answer import answer
from serving.openai_request import require_model, to_request
from serving.openai_schemas import ImagesRequest, ImagesResponse, Model, ModelList
from serving.studio import Studio

PARAMETERS = tuple(ImagesRequest.model_fields)
"""What a generation's body may hold."""
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorEnvelope} for status in (400, 404, 429, 500, 503)}


def openai_router(studio: Studio, card: ModelCard, limits: LimitConfig) -> APIRouter:
    """The routes of this dialect."""
    router = APIRouter(prefix="/v1", tags=["openai"], responses=ERRORS)

    @router.post("/images/generations", response_model=ImagesResponse)
    async def generate(body: ImagesRequest, request: Request) -> Any:
        """Make images from a prompt."""
        require_model(body.model, card)
        return await answer(studio, to_request(body, card, limits), body, request)

    @router.get("/models")
    async def list_models() -> ModelList:
        """The model that this server runs."""
        return ModelList(data=[_model(card, card.name)])

    @router.get("/models/{model_id:path}")
    async def get_model(model_id: str) -> Model:
        """One model."""
        require_model(model_id, card)
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
