"""A request that can be sent again: what came of its body is kept while it is worked on."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Receive, Scope

from serving import seeds
from serving.terms import DEADLINE, MAX_DEADLINE_S, PATIENCE

PATIENCE_S = 600.0
"""How long a client waits that does not say so: after it, OpenAI's gives up."""


@dataclass
class Memory:
    """How much of the requests' bodies one proxy may keep.

    Attributes:
        limit_bytes: for all requests together.
        kept_bytes: by all of them now.
    """

    limit_bytes: int
    kept_bytes: int = 0


class Request:
    """One request of a client, for one or more tries.

    Args:
        scope: as the server gave it.
        receive: the client's side; read once, whatever the number of tries.
        memory: shared with the proxy's other requests.
    """

    def __init__(self, scope: Scope, receive: Receive, memory: Memory) -> None:
        self._scope = _named(scope)
        self._receive = receive
        self._memory = memory
        self._messages: list[Message] = []
        self._held_bytes = 0
        self._charged_bytes = 0
        self.path: str = scope["path"]
        self.method: str = scope["method"]
        self.headers = Headers(scope=scope)
        self.patience_s = _patience_s(scope)
        """How long the client waits."""
        self.left = False
        """The client has gone."""
        self.kept = True
        """The body can be sent again; not where there was no memory for it."""

    def scope(self, prefix: str = "") -> Scope:
        """For one try: Serve writes into it. With ``prefix``, the path of another application."""
        scope = {**self._scope, "headers": list(self._scope["headers"]), "path": f"{prefix}{self.path}"}
        if scope.get("raw_path"):
            scope["raw_path"] = prefix.encode() + scope["raw_path"]
        return scope

    def tell(self, header: str, value: str) -> None:
        """Say something to whoever works on it."""
        MutableHeaders(scope=self._scope)[header] = value

    async def body(self) -> bytes | None:
        """The whole body, before the first try; None where its length is not stated, or there is no memory for it."""
        stated = self.headers.get("content-length", "")
        if not (stated.isascii() and stated.isdigit() and len(stated) < 12 and self._charge(int(stated))):
            return None
        receive, body, more = self.receive(), b"", True
        while more and not self.left and self.kept:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        return None if more else body

    def receive(self, *, live: bool = True) -> Receive:
        """The body from its beginning, and then whatever the client does; nothing ever, unless ``live``."""
        read = 0

        async def again() -> Message:
            nonlocal read
            if read < len(self._messages):
                read += 1
                return self._messages[read - 1]
            if not live:
                await asyncio.Event().wait()
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.left = True
            elif self.kept:
                read += 1
                self._keep(message)
            return message

        return again

    def forget(self) -> None:
        """Free its memory."""
        self._memory.kept_bytes -= self._charged_bytes
        self._held_bytes = self._charged_bytes = 0
        self._messages = []
        self.kept = False

    def _keep(self, message: Message) -> None:
        if not self._charge(self._held_bytes + len(message.get("body", b""))):
            self.forget()
            return
        self._held_bytes += len(message.get("body", b""))
        self._messages.append(message)

    def _charge(self, total_bytes: int) -> bool:
        """Take memory up to a total for this request, if there is as much."""
        more = max(0, total_bytes - self._charged_bytes)
        if self._memory.kept_bytes + more > self._memory.limit_bytes:
            return False
        self._memory.kept_bytes += more
        self._charged_bytes += more
        return True


def _named(scope: Scope) -> Scope:
    """The same request with what all its tries have in common: the seed, if it names none."""
    scope = dict(scope)
    headers = MutableHeaders(scope=scope)
    headers[seeds.HEADER] = str(secrets.randbelow(seeds.LIMIT))
    return scope


def _patience_s(scope: Scope) -> float:
    headers = Headers(scope=scope)
    for name in (DEADLINE, PATIENCE):
        try:
            seconds = float(headers.get(name, ""))
        except ValueError:
            continue
        if 0 < seconds <= MAX_DEADLINE_S:
            return seconds
    return PATIENCE_S
