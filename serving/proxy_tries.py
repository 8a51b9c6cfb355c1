"""A request that a replica could not finish is sent to another: what Serve's proxy does for nobody.

A picture is a function of its request, so nothing is done twice that can be seen: the seed is drawn before the first
try, and a stream leaves out the events that its client has.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.candidate import PATH, CandidateConfig
from serving.envelope import ApiError
from serving.proxy_answer import Answer, Outcome, Try
from serving.proxy_candidate import Candidates
from serving.proxy_models import Models
from serving.proxy_request import Memory, Request
from serving.proxy_routes import Routes

MAX_TRIES = 5
"""Per request: one that kills every replica that works on it must end."""
KEPT_BYTES = 256 * 2**20
"""Of bodies, in one proxy; a request for which there is no room is tried once."""
PAUSE_S = 0.05
"""Before the second try; more before later ones."""
_MAKES = ("/v1/images/", "/v1/provenance/", "/sdapi/v1/")
"""Asked again, these change nothing."""
_TELLS = ("/v1/", "/sdapi/", "/readyz", "/healthz")
"""Ours to read; other paths may be another application's."""

log = logging.getLogger(__name__)


class Tries:
    """ASGI middleware of Serve's proxy: tries again within the client's patience, and lets a candidate take part."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._memory = Memory(KEPT_BYTES)
        routes = Routes(app)
        self._candidates = Candidates(app, routes)
        self._models = Models(app, routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on what is not ours."""
        if scope["type"] == "http" and scope["path"] == PATH:
            await self._candidates.refresh()
            measured = [each.model_dump() for each in self._candidates.measured()]
            await JSONResponse(measured)(scope, receive, send)
        elif scope["type"] == "http" and _is_repeatable(scope):
            await self._answer(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, answer = Request(scope, receive, self._memory), Answer(send)
        copied = False
        try:
            if listed := await self._models.listed(request):
                await JSONResponse(listed)(scope, receive, send)
                return
            prefix = await self._models.prefix(request)
            chosen = None if prefix else await self._candidates.choose(request)
            trial = chosen if chosen and chosen.kind == "canary" else None
            await self._try_all(request, answer, prefix, trial)
            if answer.streaming and not answer.done and not request.left:
                await answer.break_off(bytes(replica_lost().response().body))
            if chosen and chosen.kind == "shadow" and answer.done:
                copied = self._candidates.copy(chosen, request)
        finally:
            if not copied:
                request.forget()

    async def _try_all(self, request: Request, answer: Answer, prefix: str, trial: CandidateConfig | None) -> None:
        ends = time.monotonic() + request.patience_s
        for number in range(1, MAX_TRIES + 1):

            def more(number: int = number) -> bool:
                repeatable = request.kept and not request.left and answer.continuable
                return repeatable and number < MAX_TRIES and time.monotonic() < ends

            one = Try(answer, more, trial=trial is not None)
            started = time.monotonic()
            await self._try(request, one, trial.route if trial else prefix, more, None if number == 1 else ends)
            outcome = one.outcome
            if trial and (outcome is Outcome.DONE or not request.left):  # a whole answer ends in a disconnect, too
                self._candidates.note(trial, outcome, time.monotonic() - started)
            if outcome is Outcome.DONE or not more():
                return
            log.warning("%s: try %d was %s", request.path, number, outcome)
            await asyncio.sleep(0 if trial else PAUSE_S * number)
            trial = None

    async def _try(self, request: Request, one: Try, prefix: str, more: Callable[[], bool], ends: float | None) -> None:
        """Have one replica answer; where none is there, not for longer than until ``ends``."""
        try:
            async with asyncio.timeout(None if ends is None else max(0.0, ends - time.monotonic())):
                await self.app(request.scope(prefix), request.receive(), one)
        except TimeoutError:
            log.warning("%s: no replica answers in time", request.path)
        except Exception:
            if not more():
                raise
            log.exception("%s: the proxy failed", request.path)


def replica_lost() -> ApiError:
    """What a client is told when no try was of use."""
    message = "The replica that worked on this request is gone.\n  mend:    send the request again"
    return ApiError(503, message, code="replica_lost", headers={"Retry-After": "1"})


def _is_repeatable(scope: Scope) -> bool:
    path = scope["path"]
    return path.startswith(_MAKES) or (scope["method"] in {"GET", "HEAD"} and (path == "/" or path.startswith(_TELLS)))
