"""OpenAI's error envelope and request ids, for every response of the server.

``{"error": {"message", "type", "param", "code"}}`` with an ``x-request-id`` header: also for unknown routes, wrong
methods, bodies that do not validate, and defects.
"""

from __future__ import annotations

import logging
import math
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import (
    DeadlineError,
    EngineError,
    JobsFullError,
    QueueFullError,
    QuotaError,
    RequestError,
    WorkLimitError,
)
from training.errors import DarkroomError

log = logging.getLogger(__name__)
CLIENT_GONE = 499
"""Nobody reads this status: the client has closed the connection."""
MAX_RETRY_AFTER_S = 120
"""Clients give up above this."""
_NO_USE = {"x-should-retry": "false"}
"""What OpenAI's clients obey: the same request again gets the same answer."""
_CODES = {404: "unknown_url", 405: "method_not_allowed", 408: "body_too_slow", 413: "body_too_large"}
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}")


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    """One sentence; then value, rule and options, one a line."""
    type: str
    """``invalid_request_error``, ``rate_limit_error`` or ``server_error``."""
    param: str | None = Field(default=None)
    """The field of the request that is wrong."""
    code: str | None = Field(default=None)
    """A word for programs."""


class ErrorEnvelope(BaseModel):
    """Every response that is not a success."""

    error: ErrorBody
    """What went wrong."""


class ApiError(Exception):
    """A response in OpenAI's envelope.

    Args:
        status: HTTP status.
        message: what went wrong.
        param: the field that is wrong.
        code: a word for programs.
        headers: more headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(message=_whole(message), type=_type_of(status), param=param and _whole(param), code=code)
        self.headers = dict(headers or {})

    def response(self) -> JSONResponse:
        """The response to send."""
        envelope = ErrorEnvelope(error=self.body)
        return JSONResponse(envelope.model_dump(), status_code=self.status, headers=self.headers)


def _whole(text: str) -> str:
    """A client's words, quoted; half a character, which JSON can spell and UTF-8 cannot, as its number."""
    return text.encode(errors="backslashreplace").decode()


def _type_of(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def from_error(error: DarkroomError) -> ApiError:
    """What a typed error is over HTTP."""
    if isinstance(error, QueueFullError | WorkLimitError):
        headers = {"Retry-After": str(error.retry_after_s)}
        return ApiError(503, error.as_text(), code="queue_full", headers=headers)
    if isinstance(error, JobsFullError):
        return ApiError(503, error.as_text(), code="jobs_full", headers={"Retry-After": "60"})
    if isinstance(error, QuotaError):
        return ApiError(429, error.as_text(), code="rate_limit_exceeded", headers=_until_quota(error))
    if isinstance(error, DeadlineError):
        return ApiError(408, error.as_text(), code="deadline_exceeded", headers=_NO_USE)
    if isinstance(error, RequestError):
        return ApiError(400, error.as_text(), param=error.param, code=error.code)
    if isinstance(error, EngineError):
        return ApiError(503, error.as_text(), code="engine_error", headers={"Retry-After": "1"})
    return ApiError(500, error.as_text(), code="internal_error")


def _until_quota(error: QuotaError) -> dict[str, str]:
    """When to come back; clients that would come back too early, or for nothing, are told not to."""
    if error.wait_s is None:
        return _NO_USE
    after = {"Retry-After": str(min(MAX_RETRY_AFTER_S, max(1, math.ceil(error.wait_s))))}
    return after if error.wait_s <= MAX_RETRY_AFTER_S else {**after, **_NO_USE}


def from_validation(errors: Sequence[Any], options: Sequence[str]) -> ApiError:
    """What the first of pydantic's complaints about a body is over HTTP.

    Args:
        errors: as pydantic lists them.
        options: the parameters that exist.
    """
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(place) or None
    if first["type"] == "extra_forbidden":
        message = f"Unknown parameter: '{param}'.\n  options: {', '.join(options)}"
        return ApiError(400, message, param=param, code="unknown_parameter")
    if first["type"] == "missing" and param:
        return ApiError(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if first["type"] == "json_invalid":
        message = f"The body is not valid JSON: {first['ctx']['error']}."
        return ApiError(400, message, code="invalid_json")
    if not param:
        return ApiError(400, f"The body is not a JSON object: {first['msg']}.", code="invalid_body")
    value = repr(first["input"])
    shown = value if len(value) <= 80 else value[:77] + "..."
    return ApiError(
        400,
        f"Invalid value for '{param}'.\n  value:   {shown}\n  rule:    {first['msg']}",
        param=param,
        code="invalid_value",
    )


class RequestIds:
    """ASGI middleware: every response says which request it answers; a client's own id is kept."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and name it in the response's headers."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        MutableHeaders(scope=scope)["x-request-id"] = request_id  # for whatever inside names the request

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


def install(
    app: FastAPI,
    parameters: Mapping[str, Sequence[str]],
    shapes: Mapping[str, Callable[[ApiError], JSONResponse]],
) -> None:
    """Make every response of ``app`` speak the envelope.

    Args:
        app: the application.
        parameters: what a body may hold below a path, for the message about one that it may not.
        shapes: how errors below a path are shaped where it is not as here.
    """

    def typed(request: Request, error: Exception) -> ApiError:
        if isinstance(error, ApiError):
            return error
        if isinstance(error, DarkroomError):
            return from_error(error)
        if isinstance(error, RequestValidationError):
            path = request.url.path
            options = next((options for prefix, options in parameters.items() if path.startswith(prefix)), ())
            return from_validation(error.errors(), options)
        if isinstance(error, HTTPException):
            message = f"{error.detail}: {request.method} {request.url.path}"
            code = _CODES.get(error.status_code)
            return ApiError(error.status_code, message, code=code, headers=error.headers)
        if isinstance(error, ClientDisconnect):
            return ApiError(CLIENT_GONE, "The client left before all of its request was here.")
        log.error("defect in %s %s", request.method, request.url.path, exc_info=error)
        return ApiError(500, "The server has a defect; its log names it.", code="internal_error")

    async def shaped(request: Request, error: Exception) -> JSONResponse:
        found = typed(request, error)
        for path, shape in shapes.items():
            if request.url.path.startswith(path):
                return shape(found)
        return found.response()

    for kind in (ApiError, DarkroomError, RequestValidationError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, shaped)
