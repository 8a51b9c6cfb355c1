"""The page at ``/``: three files that any browser reads, without a build step."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

WEB = Path(__file__).parent / "web"
_FILES = {"": "index.html", "web/app.js": "app.js", "web/style.css": "style.css"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
"""Nothing but its own script and style runs, nothing is fetched from elsewhere, nobody frames it."""


def page_router() -> APIRouter:
    """The page and its two files."""
    router = APIRouter(include_in_schema=False)
    for path, name in _FILES.items():
        router.add_api_route(f"/{path}", _sender(name), methods=["GET", "HEAD"], response_class=FileResponse)
    return router


def _sender(name: str) -> Callable[[], Awaitable[FileResponse]]:
    async def send() -> FileResponse:
        return FileResponse(WEB / name, headers=_HEADERS)

    return send
