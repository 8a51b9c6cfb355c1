"""The application of one replica: an engine, its routes, its errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from starlette.types import ASGIApp

from serving import envelope, openapi
from serving.a1111_api import PREFIX, a1111_router, failure
from serving.a1111_schemas import Failure
from serving.admission_config import AdmissionConfig
from serving.audit_config import AuditConfig
from serving.body_limit import BodyLimit
from serving.caller import Callers
from serving.config import LimitConfig
from serving.engine import Engine
from serving.gate import Gate
from serving.health import health_router
from serving.jobs import Jobs
from serving.jobs_api import JOB_PARAMETERS, jobs_router
from serving.jobs_config import JobsConfig
from serving.jobs_record import JOBS
from serving.keys import Keys
from serving.model import ModelCard
from serving.observer import Silent
from serving.openai_api import PARAMETERS, openai_router
from serving.openai_edits import edits_router
from serving.page import page_router
from serving.provenance_api import VERIFY, verify_router
from serving.provenance_config import ProvenanceConfig
from serving.safety import Safety
from serving.slow_clients import SlowClients
from serving.studio import Studio
from serving.telemetry import Telemetry, Watched
from serving.uploads import MAX_UPLOAD_BYTES

_BODY_BYTES = 1_000_000
"""Of JSON without pictures."""
_PICTURE_BODIES = {
    "/v1/images/edits": 2 * MAX_UPLOAD_BYTES + _BODY_BYTES,
    "/v1/images/variations": MAX_UPLOAD_BYTES + _BODY_BYTES,
    VERIFY: MAX_UPLOAD_BYTES + _BODY_BYTES,
    **dict.fromkeys((PREFIX, JOBS), 4 * 2 * MAX_UPLOAD_BYTES // 3 + _BODY_BYTES),  # a picture and a mask in base64
}
_GUARDED = ("/v1/", "/sdapi/")
"""Where keys are asked for; the page, health and metrics have no need."""


def create_app(
    engine: Engine,
    card: ModelCard,
    limits: LimitConfig,
    *,
    behind_proxy: bool = False,
    telemetry: Telemetry | None = None,
    provenance: ProvenanceConfig | None = None,
    safety: Safety | None = None,
    audit: AuditConfig | None = None,
    admission: AdmissionConfig | None = None,
    jobs: JobsConfig | None = None,
) -> ASGIApp:
    """The ASGI application; its lifespan starts and stops the engine.

    Args:
        engine: not started yet.
        card: the model that the engine runs.
        limits: what one request may ask for.
        behind_proxy: Serve's proxy names every response with ``x-request-id`` itself; a second one would join it.
        telemetry: watches the requests, and the engine where it was given its ``observer``; None watches nothing.
        provenance: how pictures are marked.
        safety: what is refused; None refuses nothing.
        audit: the audit log; None keeps none.
        admission: who may ask, and for how much; None lets everybody in.
        jobs: where jobs are kept; None is a folder of this process's own.

    Raises:
        ConfigError: the signing certificate, the file of API keys or the webhook secret cannot be used.
    """
    observer = Silent() if telemetry is None else telemetry.observer
    admission = admission or AdmissionConfig()
    keys = None if admission.keys is None else Keys(Path(admission.keys).expanduser())
    studio = Studio(
        engine, card, provenance=provenance, safety=safety, audit=audit, admission=admission, observer=observer
    )
    kept = Jobs(studio, jobs or JobsConfig())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with studio, kept:
            yield
        if telemetry is not None:
            telemetry.close()

    app = FastAPI(title="Darkroom", summary="Images from text.", lifespan=lifespan)
    app.include_router(openai_router(studio, card, limits))
    app.include_router(edits_router(studio, card, limits))
    app.include_router(a1111_router(studio, card, limits))
    app.include_router(jobs_router(kept, card, limits))
    app.include_router(verify_router(card, studio.provenance))
    app.include_router(page_router())
    app.include_router(health_router(engine, card))
    if telemetry is not None and telemetry.scraped is not None:
        app.include_router(telemetry.scraped.router())
    shapes = {PREFIX: failure}
    app.add_middleware(Gate, keys=keys, guarded=_GUARDED, basic=PREFIX, shapes=shapes, observer=observer)
    app.add_middleware(Callers, dialects={PREFIX: "a1111", JOBS: "jobs"}, otherwise="openai")
    app.add_middleware(BodyLimit, usual=_BODY_BYTES, larger=_PICTURE_BODIES)
    app.add_middleware(SlowClients, stall_s=admission.stall_s)
    envelope.install(app, {JOBS: JOB_PARAMETERS, "": PARAMETERS}, shapes)
    openapi.describe(app, card, limits, {PREFIX: Failure}, envelope.ErrorEnvelope)
    named = app if behind_proxy else envelope.RequestIds(app)
    return named if telemetry is None else Watched(named, telemetry)
