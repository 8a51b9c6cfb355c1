"""Serve's table of routes, as this process's proxy has it: the controller keeps it, and it outlives every process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message

REFRESH_S = 1.0
"""Age at which the table is read again."""


class Routes:
    """The route prefixes of all applications.

    Args:
        app: Serve's proxy.
        clock: seconds.
    """

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._clock = clock
        self._read_at = float("-inf")
        self._routes: tuple[str, ...] = ()

    async def current(self) -> tuple[str, ...]:
        """They, at most ``REFRESH_S`` old; the last ones that were known while the proxy cannot tell."""
        if self._clock() - self._read_at >= REFRESH_S:
            self._read_at = self._clock()
            self._routes = await self._ask() or self._routes
        return self._routes

    async def _ask(self) -> tuple[str, ...] | None:
        """Serve's own answer to ``GET /-/routes``, asked inside this process."""
        status, body = 0, b""

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            nonlocal status, body
            status = message.get("status", status)
            body += message.get("body", b"")

        target = {"type": "http", "method": "GET", "path": "/-/routes", "root_path": "", "headers": []}
        await self._app({**target, "query_string": b""}, receive, send)
        return tuple(json.loads(body)) if status == 200 else None
