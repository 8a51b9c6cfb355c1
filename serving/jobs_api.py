"""Our own dialect: jobs that outlive the connection. Submit, look, follow, cancel, fetch."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Path, Response
from fastapi.responses import StreamingResponse

from serving.caller import current_caller
from serving.config import LimitConfig
from serving.envelope import ApiError
from serving.jobs import Jobs
from serving.jobs_record import JOBS, JobRecord
from serving.jobs_request import new_job
from serving.jobs_schemas import JobRequest, JobStatus, WebhookSecret
from serving.model import ModelCard
from serving.openai_request import out_of_range, require_model
from serving.webhook import WebhookSecrets
from serving.webhook_address import resolve

JOB_PARAMETERS = tuple(JobRequest.model_fields)
"""What a job's body may hold."""
_QUIET_S = 15.0
"""A stream of events says at least so often that it is still there."""
_UNBUFFERED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Proxies that gather a response would hold its events back."""

IdempotencyKey = Annotated[
    str | None, Header(json_schema_extra={"minLength": 1, "maxLength": 255, "pattern": "^[ -~]+$"})
]
LastEventId = Annotated[str | None, Header(json_schema_extra={"pattern": "^[0-9]{1,9}$"})]
JobId = Annotated[str, Path(description="The job's id.")]


def jobs_router(jobs: Jobs, card: ModelCard, limits: LimitConfig) -> APIRouter:
    """The routes of this dialect."""
    router = APIRouter(prefix="/v1", tags=["jobs"])

    @router.post("/jobs", status_code=202, responses={200: {"model": JobStatus}})
    async def submit(body: JobRequest, response: Response, idempotency_key: IdempotencyKey = None) -> JobStatus:
        """Accept a job. With an ``Idempotency-Key`` that was here before, answer 200 with the job that it made."""
        require_model(body.model, card)
        if body.webhook_url is not None:
            _webhook_secrets(jobs)
            await resolve(body.webhook_url, private=jobs.config.webhook_private)
        job = await new_job(body, idempotency_key, card, limits)
        status, repeated = await jobs.submit(job.record, job.asked, job.body_sha256)
        response.headers["Location"] = f"{JOBS}/{status.id}"
        if repeated:
            response.status_code = 200
            response.headers["Idempotency-Replayed"] = "true"
        return status

    @router.get("/jobs/{job_id}")
    async def look(job_id: JobId) -> JobStatus:
        """Where a job is, and its images so far."""
        return await _status(jobs, job_id)

    @router.get(
        "/jobs/{job_id}/events",
        response_class=StreamingResponse,
        responses={
            200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
            204: {"description": "The job has ended, and the client knows all of its events."},
        },
    )
    async def events(job_id: JobId, last_event_id: LastEventId = None) -> Response:
        """What happens to a job, as server-sent events, until it ends; after ``Last-Event-ID``, what came since."""
        after = _number(last_event_id)
        await _require(jobs, job_id)
        if await jobs.over(job_id, after):
            return Response(status_code=204)
        return StreamingResponse(_lines(jobs, job_id, after), media_type="text/event-stream", headers=_UNBUFFERED)

    @router.post("/jobs/{job_id}/cancel")
    async def cancel(job_id: JobId) -> JobStatus:
        """End a job; what is finished of it stays. One that has ended stays as it is."""
        await _require(jobs, job_id)
        await jobs.cancel(job_id)
        return await _status(jobs, job_id)

    @router.get(
        "/jobs/{job_id}/images/{index}",
        response_class=Response,
        responses={200: {"content": {f"image/{kind}": {} for kind in ("png", "webp", "jpeg")}}},
    )
    async def image(job_id: JobId, index: Annotated[int, Path(ge=0, le=10**6)]) -> Response:
        """The file of a finished image."""
        record = await _require(jobs, job_id)
        file = await jobs.image(job_id, index)
        if file is None:
            message = f"This image is not here.\n  value:   {index}\n  rule:    a finished image of {job_id}"
            raise ApiError(404, message, param="index", code="image_not_found")
        return Response(file, media_type=f"image/{record.output_format}")

    @router.get("/webhook-secret")
    async def webhook_secret() -> WebhookSecret:
        """What the webhooks of this API key's jobs are signed with."""
        return WebhookSecret(secret=_webhook_secrets(jobs).of(current_caller().key))

    return router


async def _lines(jobs: Jobs, job_id: str, after: int) -> AsyncIterator[str]:
    said_s = time.monotonic()
    async for event in jobs.events(job_id, after):
        if event is not None:
            said_s = time.monotonic()
            yield f"id: {event.number}\nevent: {event.kind}\ndata: {event.data}\n\n"
        elif time.monotonic() - said_s >= _QUIET_S:
            said_s = time.monotonic()
            yield ": still here\n\n"


async def _require(jobs: Jobs, job_id: str) -> JobRecord:
    record = await jobs.find(job_id, current_caller().key)
    if record is None:
        raise _unknown(jobs, job_id)
    return record


async def _status(jobs: Jobs, job_id: str) -> JobStatus:
    status = await jobs.status(job_id, current_caller().key)
    if status is None:
        raise _unknown(jobs, job_id)
    return status


def _unknown(jobs: Jobs, job_id: str) -> ApiError:
    rule = f"a job of this API key, at most {jobs.config.results_kept_s:g} s after its end"
    message = f"There is no such job.\n  value:   {job_id[:80]!r}\n  rule:    {rule}"
    return ApiError(404, message, param="job_id", code="job_not_found")


def _number(last_event_id: str | None) -> int:
    if last_event_id is None:
        return 0
    if not (last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) <= 9):
        raise out_of_range("Last-Event-ID", repr(last_event_id[:80]), "the id of one of this job's events")
    return int(last_event_id)


def _webhook_secrets(jobs: Jobs) -> WebhookSecrets:
    if jobs.secrets is None:
        raise out_of_range("webhook_url", "given", "none: this server has no webhook secret, and calls nobody unsigned")
    return jobs.secrets
