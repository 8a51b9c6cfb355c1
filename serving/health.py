"""Whether the process lives and whether it can work: for load balancers and for people."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from serving.engine import Engine
from serving.model import ModelCard
from serving.readiness import Readiness


def health_router(engine: Engine, card: ModelCard) -> APIRouter:
    """``/healthz`` answers 200 while the process does; ``/readyz`` 200 while requests are denoised, else 503."""
    router = APIRouter(tags=["health"])

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @router.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
    async def readyz() -> JSONResponse:
        """Requests are accepted; by which model, and with how many images at work."""
        ready = engine.ready
        state = Readiness(
            status="ready" if ready else "not ready",
            model=card.names[-1],
            bundle_sha256=card.bundle_sha256,
            running_images=engine.running_images,
            waiting_images=engine.waiting_images,
        )
        return JSONResponse(state.model_dump(), status_code=200 if ready else 503)

    return router
