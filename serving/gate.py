"""The gate before every dialect: who asks, on which terms; and on the way out, what is left of a key's quota."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.caller import current_caller
from serving.envelope import ApiError
from serving.keys import ApiKey, Keys
from serving.observer import Observer
from serving.terms import terms_of

_BASIC = 'Basic realm="darkroom"'


class Gate:
    """ASGI middleware: what has no key goes no further, also before its body is read.

    It stands inside ``Callers``. OpenAI's clients send ``Authorization: Bearer SECRET``; the A1111 UI's send basic
    authentication, a key's name and its secret. Either is taken everywhere.

    Args:
        app: the application.
        keys: who may ask; None asks for no key.
        guarded: what the paths begin with that need one.
        basic: what the paths begin with whose clients speak basic authentication.
        shapes: how errors below a path are shaped where it is not OpenAI's envelope.
        observer: told of those that are sent away.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys | None,
        guarded: Sequence[str],
        basic: str,
        shapes: Mapping[str, Callable[[ApiError], JSONResponse]],
        observer: Observer,
    ) -> None:
        self.app = app
        self.keys = keys
        self.guarded = tuple(guarded)
        self.basic = basic
        self.shapes = shapes
        self.observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer it."""
        if scope["type"] != "http" or not scope["path"].startswith(self.guarded):
            await self.app(scope, receive, send)
            return
        caller = current_caller()
        try:
            headers = Headers(scope=scope)
            key = None if self.keys is None else self._require(headers, self.keys, scope["path"])
            caller.key = None if key is None else key.name
            caller.terms = terms_of(headers, key)
        except ApiError as error:
            self.observer.rejected("key" if error.status in {401, 403} else "invalid")
            await self._shaped(error, scope["path"])(scope, receive, send)
            return

        async def send_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(caller.limits)
            await send(message)

        await self.app(scope, receive, send_limits)

    def _require(self, headers: Headers, keys: Keys, path: str) -> ApiKey:
        """The key that the request has.

        Raises:
            ApiError: it has none, or one that is not known.
        """
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        basic = path.startswith(self.basic)
        # a browser that shows the page asks its user for a name and a secret, where it is challenged so
        asked = {"WWW-Authenticate": _BASIC if basic else f"Bearer, {_BASIC}"}
        if not credentials.strip():
            way = "a key's name and its secret by basic authentication" if basic else "Bearer SECRET"
            message = f"There is no API key in this request.\n  rule:    the header Authorization has {way}"
            raise ApiError(401, message, code="missing_api_key", headers=asked)
        key = self._found(keys, scheme.lower(), credentials.strip())
        if key is None:
            message = "This API key is not known.\n  mend:    ask whoever runs this server for a key"
            raise ApiError(401, message, code="invalid_api_key", headers=asked)
        return key

    def _found(self, keys: Keys, scheme: str, credentials: str) -> ApiKey | None:
        if scheme == "bearer":
            return keys.find(credentials)
        if scheme != "basic":
            return None
        try:
            name, _, secret = base64.b64decode(credentials, validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            return None
        key = keys.find(secret)
        return key if key is not None and key.name == name else None

    def _shaped(self, error: ApiError, path: str) -> JSONResponse:
        for prefix, shape in self.shapes.items():
            if path.startswith(prefix):
                return shape(error)
        return error.response()
