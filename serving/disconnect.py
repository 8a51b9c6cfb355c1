"""When a client leaves."""

from __future__ import annotations

from fastapi import Request


async def disconnected(request: Request) -> None:
    """Returns when the client has gone; the body has been read already."""
    while (await request.receive())["type"] != "http.disconnect":
        continue
