"""How large a request's body may be, told before it is in memory or on the disk."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """ASGI middleware: a body that is too large is a 413, as soon as its length is stated or its bytes have come.

    It is raised where the body is read, so that each dialect shapes it; FastAPI's own ``max_body_size`` answers text.

    Args:
        app: the application.
        usual: bytes of a body.
        larger: bytes of a body for the paths that begin so, where pictures are sent.
    """

    def __init__(self, app: ASGIApp, usual: int, larger: Mapping[str, int]) -> None:
        self.app = app
        self.usual = usual
        self.larger = larger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = next((limit for path, limit in self.larger.items() if scope["path"].startswith(path)), self.usual)
        stated = Headers(scope=scope).get("content-length", "")
        came = 0

        async def counted() -> Message:
            nonlocal came
            if stated.isdecimal() and int(stated[:20]) > limit:
                raise _too_large(limit)
            message = await receive()
            came += len(message.get("body", b""))
            if came > limit:
                raise _too_large(limit)
            return message

        await self.app(scope, counted, send)


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"The body has more than {limit} bytes")
