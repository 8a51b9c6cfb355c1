"""One answer out of several tries: nothing is told twice, and a stream goes on where another replica left it."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import Message, Send

_BROKEN = b'"engine_error"'
"""Every dialect's word for an engine that failed or is stopping: another one may do it."""
_FULL = b'"queue_full"'
"""Every dialect's word for an engine that has enough to do: that is no failure of a candidate."""
_ERROR_EVENT = b"event: error\n"


class Outcome(StrEnum):
    """What became of one try."""

    DONE = "done"
    """The client has the whole answer."""
    LOST = "lost"
    """The replica went away before that."""
    FAILED = "failed"
    """Its engine could not; the client was not told."""
    REFUSED = "refused"
    """A candidate said no; the client was not told."""


class Answer:
    """What the client has by now.

    Args:
        send: the client's side.
    """

    def __init__(self, send: Send) -> None:
        self.send = send
        self.begun = False
        self.streaming = False
        self.done = False
        self.seen: set[bytes] = set()

    async def break_off(self, error: bytes) -> None:
        """End a stream that nobody can go on with.

        Args:
            error: an envelope.
        """
        self.done = True
        await self.send({"type": "http.response.body", "body": _error_event(error)})

    @property
    def continuable(self) -> bool:
        """Whether another try can be of use: nothing was sent, or events, which name themselves."""
        return not self.done and (not self.begun or self.streaming)


class Try:
    """The messages of one replica on their way to the client.

    Args:
        answer: shared by all tries.
        more: whether there may be another try.
        trial: a candidate's try: its refusals are not shown.
    """

    def __init__(self, answer: Answer, more: Callable[[], bool], *, trial: bool) -> None:
        self._answer = answer
        self._more = more
        self._trial = trial
        self._start: Message | None = None
        self._streaming = False
        self._rest = b""
        self._withheld: Outcome | None = None
        self.status = 0

    @property
    def outcome(self) -> Outcome:
        """Once the replica has said all that it will."""
        if self._withheld is not None:
            return self._withheld
        return Outcome.DONE if self._answer.done else Outcome.LOST

    async def __call__(self, message: Message) -> None:
        """Take the next message."""
        if self._withheld is not None:
            return
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] == "http.response.body":
            await self._go_on(message)
        else:
            await self._answer.send(message)

    async def _begin(self, message: Message) -> None:
        """The head waits for the first part of the body, so that both can still be withheld; a stream's does not."""
        self._start = message
        self.status = int(message["status"])
        kind = Headers(raw=message["headers"]).get("content-type", "")
        self._streaming = kind.startswith("text/event-stream")
        if self._streaming:
            await self._send_start()

    async def _go_on(self, message: Message) -> None:
        body: bytes = message.get("body", b"")
        last = not message.get("more_body", False)
        self._withheld = self._withholds(body) if self._more() else None
        if self._withheld is not None:
            return
        answer = self._answer
        if answer.streaming and not self._streaming:  # the next replica refuses what was promised
            self._rest += body
            if not last:
                return
            message = {"type": "http.response.body", "body": _error_event(self._rest)}
        elif answer.streaming and body.startswith(b"id: "):
            name = body.partition(b"\n")[0]
            if name in answer.seen:
                message = {**message, "body": b""}
            answer.seen.add(name)
        await self._send_start()
        if last:
            answer.done = True
        await answer.send(message)

    def _withholds(self, body: bytes) -> Outcome | None:
        """Whether the client is better served by another try."""
        if self._streaming:
            broken = body.startswith(_ERROR_EVENT) and (self._trial or _BROKEN in body)
            return Outcome.FAILED if broken else None
        if self.status == HTTPStatus.SERVICE_UNAVAILABLE and _BROKEN in body:
            return Outcome.FAILED
        if self._trial and not self._answer.begun and self.status >= HTTPStatus.BAD_REQUEST:
            failed = self.status >= HTTPStatus.INTERNAL_SERVER_ERROR and _FULL not in body
            return Outcome.FAILED if failed else Outcome.REFUSED
        return None

    async def _send_start(self) -> None:
        answer = self._answer
        if answer.begun or self._start is None:
            return
        answer.begun = True
        answer.streaming = self._streaming
        await answer.send(self._start)


def _error_event(error: bytes) -> bytes:
    return _ERROR_EVENT + b"data: " + error + b"\n\n"
