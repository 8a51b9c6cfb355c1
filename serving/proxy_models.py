"""Several models behind one address: a request's ``model`` chooses the application that has it."""

from __future__ import annotations

import json
import re

from starlette.types import ASGIApp, Message

from serving.beside import HEADER, PATH
from serving.proxy_candidate import MAKES
from serving.proxy_request import Request
from serving.proxy_routes import Routes

_FORM = re.compile(rb'name="model"\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]{1,200})\r\n')
LIST = "/v1/models"
"""Where a server says which models it has."""
_ABOUT = f"{LIST}/"


class Models:
    """Which models are beside the main one.

    Args:
        app: Serve's proxy.
        routes: its table.
    """

    def __init__(self, app: ASGIApp, routes: Routes) -> None:
        self._app = app
        self._routes = routes

    async def names(self) -> list[str]:
        """They, by name."""
        return [
            route.removeprefix(f"{PATH}/") for route in await self._routes.current() if route.startswith(f"{PATH}/")
        ]

    async def prefix(self, request: Request) -> str:
        """The route prefix of the model that a request names; empty for the main one, which knows what is unknown."""
        beside = await self.names()
        if not beside:
            return ""
        request.tell(HEADER, ", ".join(beside))
        name = (await _asked(request)).partition("/")[0]
        return f"{PATH}/{name}" if name in beside else ""

    async def listed(self, request: Request) -> dict[str, object] | None:
        """All models in one list, where every application gives its own; None where that is for the main one to do."""
        beside = await self.names() if (request.method, request.path) == ("GET", LIST) else []
        if not beside:
            return None
        found = [await self._ask(request, prefix) for prefix in ("", *(f"{PATH}/{name}" for name in beside))]
        data = [model for each in found if each for model in each["data"]]
        return {**found[0], "data": data} if found[0] else None

    async def _ask(self, request: Request, prefix: str) -> dict[str, list[object]] | None:
        status, body = 0, b""

        async def keep(message: Message) -> None:
            nonlocal status, body
            status = message.get("status", status)
            body += message.get("body", b"")

        await self._app(request.scope(prefix), request.receive(), keep)
        found: dict[str, list[object]] = json.loads(body) if status == 200 else {}
        return found or None


async def _asked(request: Request) -> str:
    """What a request calls its model; empty where it names none."""
    if request.path.startswith(_ABOUT):
        return request.path.removeprefix(_ABOUT)
    if request.method != "POST" or not request.path.startswith(MAKES):
        return ""
    body = await request.body()
    if body is None:
        return ""
    if request.headers.get("content-type", "").startswith("multipart/"):
        found = _FORM.search(body)
        return found[1].decode(errors="replace") if found else ""
    try:
        told = json.loads(body)
    except ValueError:
        return ""
    if not isinstance(told, dict):
        return ""
    settings = told.get("override_settings")
    name = told.get("model") or (settings.get("sd_model_checkpoint") if isinstance(settings, dict) else None)
    return name.partition(" [")[0] if isinstance(name, str) else ""
