"""Who asks: what is known of the HTTP request that is being answered, wherever the code is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.terms import Terms


@dataclass
class Caller:
    """One HTTP request.

    Attributes:
        dialect: the API that it speaks.
        request_id: its name; empty where nothing named it.
        key: the name of its API key; None where it has none.
        terms: on which it asks.
        limits: what is left of its key's quota, as the response's headers tell it.
    """

    dialect: str
    request_id: str = ""
    key: str | None = None
    terms: Terms = field(default_factory=Terms)
    limits: dict[str, str] = field(default_factory=dict)


_current: ContextVar[Caller | None] = ContextVar("caller", default=None)


def current_caller() -> Caller:
    """The request that is being answered; outside of one, nobody."""
    return _current.get() or Caller("none")


@contextmanager
def acting_for(caller: Caller) -> Iterator[None]:
    """Inside, the work is this caller's."""
    token = _current.set(caller)
    try:
        yield
    finally:
        _current.reset(token)


class Callers:
    """ASGI middleware: inside, ``current_caller`` knows the request.

    Args:
        app: the application.
        dialects: the API's name by what its paths begin with.
        otherwise: the name of all others.
    """

    def __init__(self, app: ASGIApp, dialects: Mapping[str, str], otherwise: str) -> None:
        self.app = app
        self.dialects = dialects
        self.otherwise = otherwise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        named = (name for path, name in self.dialects.items() if scope["path"].startswith(path))
        caller = Caller(next(named, self.otherwise), Headers(scope=scope).get("x-request-id", ""))
        with acting_for(caller):
            await self.app(scope, receive, send)
