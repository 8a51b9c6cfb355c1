"""A candidate's share of the traffic that comes through one of Serve's proxies, and what is measured of it.

Which candidate there is stands in Serve's table of routes: the controller keeps it, and every proxy has it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from starlette.types import ASGIApp, Message

from serving.candidate import CandidateConfig, Measured
from serving.proxy_answer import Answer, Outcome, Try
from serving.proxy_request import Request
from serving.proxy_routes import Routes

MAX_COPIES = 8
"""Requests that a shadow works on at a time; more are not copied, so that it cannot pile up work."""
MAKES = ("/v1/images/", "/sdapi/v1/txt2img", "/sdapi/v1/img2img")
"""What makes pictures; the rest is about the server itself."""

log = logging.getLogger(__name__)


@dataclass
class Tally:
    """What was seen of one candidate."""

    requests: int = 0
    errors: int = 0
    refused: int = 0
    skipped: int = 0
    sum_s: float = 0.0
    max_s: float = 0.0

    def stopped(self, config: CandidateConfig) -> bool:
        """Whether it has failed too many."""
        return self.requests >= config.min_requests and self.errors > config.max_error_rate * self.requests

    def told(self, config: CandidateConfig) -> Measured:
        """For people and programs."""
        succeeded = self.requests - self.errors - self.refused
        return Measured(
            route=config.route,
            requests=self.requests,
            errors=self.errors,
            refused=self.refused,
            skipped=self.skipped,
            mean_s=self.sum_s / succeeded if succeeded else 0.0,
            max_s=self.max_s,
            stopped=self.stopped(config),
        )


class Candidates:
    """The one candidate that may be there.

    Args:
        app: Serve's proxy.
        routes: its table.
    """

    def __init__(self, app: ASGIApp, routes: Routes) -> None:
        self._app = app
        self._routes = routes
        self._config: CandidateConfig | None = None
        self._tally = Tally()
        self._due = 0.0
        self._copies: set[asyncio.Task[None]] = set()

    def measured(self) -> list[Measured]:
        """What this proxy knows of the candidate; empty where there is none."""
        return [] if self._config is None else [self._tally.told(self._config)]

    async def choose(self, request: Request) -> CandidateConfig | None:
        """The candidate, where it is its turn: of every hundred requests as many as its percentage, evenly spread."""
        if request.method != "POST" or not request.path.startswith(MAKES):
            return None
        await self.refresh()
        config = self._config
        if config is None or self._tally.stopped(config):
            return None
        self._due += config.percent
        if self._due < 100:
            return None
        self._due -= 100
        return config

    def note(self, config: CandidateConfig, outcome: Outcome, seconds: float) -> None:
        """Count one request that the candidate has ended with."""
        if config != self._config:
            return
        tally = self._tally
        before = tally.stopped(config)
        tally.requests += 1
        if outcome in {Outcome.LOST, Outcome.FAILED}:
            tally.errors += 1
        elif outcome is Outcome.REFUSED:
            tally.refused += 1
        else:
            tally.sum_s += seconds
            tally.max_s = max(tally.max_s, seconds)
        if tally.stopped(config) and not before:
            log.error("the candidate gets no more requests: %s", tally.told(config).model_dump_json())

    def copy(self, config: CandidateConfig, request: Request) -> bool:
        """Give the candidate what a client was answered already; whether it takes the request over."""
        if not request.kept or len(self._copies) >= MAX_COPIES:
            self._tally.skipped += 1
            return False
        task = asyncio.create_task(self._copy(config, request))
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)
        return True

    async def _copy(self, config: CandidateConfig, request: Request) -> None:
        one = Try(Answer(_nowhere), lambda: True, trial=True)
        started = time.monotonic()
        try:
            await self._app(request.scope(config.route), request.receive(live=False), one)
        except Exception:
            log.exception("the candidate failed a copy")
        finally:
            request.forget()
            self.note(config, one.outcome, time.monotonic() - started)

    async def refresh(self) -> None:
        """See which candidate there is."""
        routes = await self._routes.current()
        found = next((config for route in routes if (config := CandidateConfig.from_route(route))), None)
        if found != self._config:
            log.info("candidate: %s", found)
            self._config, self._tally, self._due = found, Tally(), 0.0


async def _nowhere(_: Message) -> None:
    """A shadow's answers reach nobody."""
