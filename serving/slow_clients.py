"""Clients that do not read their answer, or do not send their request: they hold little, and not for long."""

from __future__ import annotations

import asyncio
import logging

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PIECE_BYTES = 64 * 2**10
"""Of an answer, handed to the server at a time: what waits for a client in its buffers is little more."""

log = logging.getLogger(__name__)


class SlowClients:
    """ASGI middleware: after ``stall_s`` without a byte, a body is a 408, and a reader counts as gone.

    What is inside then sees what it sees of a client that leaves, and frees what it holds.

    Args:
        app: the application.
        stall_s: seconds.
    """

    def __init__(self, app: ASGIApp, stall_s: float) -> None:
        self.app = app
        self.stall_s = stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, watching both sides."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        client = _Client(receive, send, self.stall_s)
        await self.app(scope, client.receive, client.send)


class _Client:
    """One client's two sides."""

    def __init__(self, receive: Receive, send: Send, stall_s: float) -> None:
        self._receive = receive
        self._send = send
        self._stall_s = stall_s
        self._whole = False
        self._gone = asyncio.Event()

    async def receive(self) -> Message:
        if self._whole:
            return await self._next()
        try:
            async with asyncio.timeout(self._stall_s):
                message = await self._receive()
        except TimeoutError as error:
            raise HTTPException(408, f"Nothing of the body came for {self._stall_s:g} s") from error
        self._whole = not message.get("more_body", False)
        return message

    async def _next(self) -> Message:
        """Whatever comes after the body: that the client leaves, or counts as gone."""
        asked = asyncio.ensure_future(self._receive())
        gone = asyncio.create_task(self._gone.wait())
        try:
            await asyncio.wait({asked, gone}, return_when=asyncio.FIRST_COMPLETED)
            return asked.result() if asked.done() else {"type": "http.disconnect"}
        finally:
            asked.cancel()
            gone.cancel()

    async def send(self, message: Message) -> None:
        body = message.get("body", b"")
        if message["type"] != "http.response.body" or len(body) <= PIECE_BYTES:
            await self._pass(message)
            return
        more = message.get("more_body", False)
        for start in range(0, len(body), PIECE_BYTES):
            last = start + PIECE_BYTES >= len(body)
            piece = body[start : start + PIECE_BYTES]
            await self._pass({**message, "body": piece, "more_body": more or not last})

    async def _pass(self, message: Message) -> None:
        if self._gone.is_set():
            return
        try:
            async with asyncio.timeout(self._stall_s):
                await self._send(message)
        except TimeoutError:
            log.warning("a client read nothing of its answer for %g s", self._stall_s)
            self._gone.set()
