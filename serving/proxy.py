"""The envelope for what Ray Serve's HTTP proxy says by itself, when no replica answers.

Serve knows no envelope: a replica that dies at work, or does not finish in the time that a shutdown leaves it, becomes
a bare ``Internal Server Error``, a route that is not there a line of text. Serve's controller is told of
``middlewares`` when it starts (``CALLBACK``), and every proxy calls it; a Serve that others started keeps its own.
"""

from __future__ import annotations

import logging
import secrets
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.envelope import ApiError
from serving.proxy_tries import Tries, replica_lost

log = logging.getLogger(__name__)

CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}.middlewares"}
"""The environment of Serve's controller, which its proxies inherit."""
_OURS = ("/v1/", "/sdapi/")
"""Below it, whatever is not JSON comes from the proxy; elsewhere it may be another application's own page."""


def middlewares() -> list[Middleware]:
    """What every proxy wraps itself in, from the inside out."""
    return [Middleware(Tries), Middleware(Envelopes)]


class Envelopes:
    """ASGI middleware: a response that never began, or a bare error, becomes an envelope with a time to come back."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and the response too unless the proxy made it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = replaced = False
        headers = MutableHeaders(scope=scope)
        if "x-request-id" not in headers:
            headers.append("x-request-id", secrets.token_hex(16))

        async def send_envelope(error: ApiError) -> None:
            error.headers["x-request-id"] = headers["x-request-id"]
            await error.response()(scope, receive, send)

        async def send_typed(message: Message) -> None:
            nonlocal begun, replaced
            if message["type"] == "http.response.start":
                begun = True
                replaced = _is_bare(scope, message)
                if replaced:
                    await send_envelope(_from_proxy(scope, message))
            if not replaced:
                await send(message)

        try:
            await self.app(scope, receive, send_typed)
        except Exception:
            if begun:
                raise
            log.exception("the proxy failed at %s %s", scope["method"], scope["path"])
        if not begun:
            await send_envelope(replica_lost())


def _is_bare(scope: Scope, message: Message) -> bool:
    """Whether the proxy made this error: replicas answer JSON."""
    kind = Headers(raw=message["headers"]).get("content-type", "")
    return message["status"] >= 400 and scope["path"].startswith(_OURS) and not kind.startswith("application/json")


def _from_proxy(scope: Scope, message: Message) -> ApiError:
    """The proxy's own refusal, at its own status."""
    status = int(message["status"])
    text = f"{HTTPStatus(status).phrase}: {scope['method']} {scope['path']}"
    if status == HTTPStatus.NOT_FOUND:
        return ApiError(status, text, code="unknown_url")
    after = Headers(raw=message["headers"]).get("retry-after", "1")
    return ApiError(status, text, code="unavailable", headers={"Retry-After": after})
