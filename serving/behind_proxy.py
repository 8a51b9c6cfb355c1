"""A replica's side of what Serve's proxy arranges: the drawn seed, the other models, the prefix of its routes."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serving import beside, seeds


class BehindProxy:
    """ASGI middleware: the application sees the path without the prefix, and knows what the proxy tells."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        root = scope.get("root_path", "")
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if root and scope["path"].startswith(f"{root}/"):
            # limits of bodies and shapes of errors go by the path
            scope = {**scope, "root_path": "", "path": scope["path"].removeprefix(root)}
        headers = Headers(scope=scope)
        with seeds.told(headers.get(seeds.HEADER)), beside.told(headers.get(beside.HEADER)):
            await self.app(scope, receive, send)
