"""What is let in: a request's terms, its key's quota, and how much work may wait before it."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from serving.admission_config import AdmissionConfig
from serving.caller import current_caller
from serving.engine import Engine
from serving.envelope import MAX_RETRY_AFTER_S
from serving.errors import DeadlineError, EngineError, QuotaError, WorkLimitError
from serving.lost import lost
from serving.observer import Observer, Silent
from serving.preparing import evaluations, rows_of
from serving.quotas import Cost, Ledger
from serving.schemas import Event, GenerationRequest, ImageReady
from serving.terms import Terms


class Admission:
    """The engine, for those who are let in.

    Args:
        engine: makes the images.
        config: how much is let in.
        observer: told of those that are not.
        ledger: what keys have used; by default what the config says.
    """

    def __init__(
        self,
        engine: Engine,
        config: AdmissionConfig | None = None,
        *,
        observer: Observer | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self.config = config or AdmissionConfig()
        self._engine = engine
        self._observer = observer or Silent()
        folder = self.config.quotas
        self._ledger = ledger or Ledger(None if folder is None else Path(folder).expanduser())
        self._entering_s = 0.0

    async def submit(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """The engine's events; what is refused, or lost by the engine, costs its key nothing.

        Raises:
            QuotaError: the key has used up its quota.
            WorkLimitError: too much work waits already.
            RequestError, QueueFullError, DeadlineError, EngineError: as the engine says.
        """
        caller = current_caller()
        request = on_terms(request, caller.terms)
        work_s = self._engine.predicted_s(request)
        self._require_in_time(request, work_s)
        self._require_room(work_s)
        self._entering_s += work_s  # from here until it waits in the engine, which counts it then
        entering, unfinished = True, request.images
        accepted = False
        try:
            caller.limits = await self._charge(caller.terms, request)
            try:
                async with aclosing(self._engine.submit(request)) as events:
                    async for event in events:
                        if entering:
                            self._entering_s -= work_s
                            entering, accepted = False, True
                        unfinished -= isinstance(event, ImageReady)
                        yield event
            except Exception as error:
                if not accepted or isinstance(error, EngineError):
                    await self._give_back(caller.terms, request, unfinished)
                raise
        finally:
            if entering:
                self._entering_s -= work_s

    def _require_in_time(self, request: GenerationRequest, work_s: float) -> None:
        """Refuse what can only be in time if somebody else is late (EDF's test, Liu and Layland 1973).

        Calls are shared: of those that are only needed in part, others get the rest.
        """
        if request.deadline_s is None or not work_s:
            return
        rows, width = rows_of(request), self._engine.padded_rows(request)
        share = rows / (math.ceil(rows / width) * width)
        needed_s = max(work_s, self._engine.promised_s(request.deadline_s) + work_s * share)
        if needed_s > request.deadline_s:
            self._observer.rejected("deadline")
            raise DeadlineError(request.deadline_s, needed_s)

    def _require_room(self, work_s: float) -> None:
        ahead_s = self._engine.backlog_s + self._entering_s
        limit_s = self.config.max_waiting_s
        over_s = ahead_s + work_s - limit_s
        if over_s <= 0 or ahead_s <= 0:
            return
        self._observer.rejected("queue_full")
        wait_s = min(over_s, ahead_s)
        raise WorkLimitError(work_s, ahead_s, limit_s, min(MAX_RETRY_AFTER_S, max(1, math.ceil(wait_s))))

    async def _charge(self, terms: Terms, request: GenerationRequest) -> dict[str, str]:
        """Spend the key's quota; what is left of it, for the response's headers."""
        if terms.key is None or not terms.charged:
            return {}
        try:
            standings = await self._ledger.spend(terms.key, cost_of(request))
        except QuotaError:
            self._observer.rejected("quota")
            raise
        except OSError as error:
            raise lost("The quota cannot be counted now.", error) from error
        return {name: value for standing in standings for name, value in standing.headers.items()}

    async def _give_back(self, terms: Terms, request: GenerationRequest, images: int) -> None:
        if terms.key is not None and terms.charged and images:
            await self._ledger.give_back(terms.key, cost_of(request.model_copy(update={"images": images})))


def on_terms(request: GenerationRequest, terms: Terms) -> GenerationRequest:
    """The request with its client's deadline and priority; a deadline that it has by itself stays."""
    deadline_s = request.deadline_s if terms.deadline_s is None else terms.deadline_s
    return request.model_copy(update={"deadline_s": deadline_s, "priority": terms.priority})


def within_patience(request: GenerationRequest) -> GenerationRequest:
    """The request with its client's patience as the deadline: for an answer that comes all at once.

    OpenAI's client gives up when no byte comes for so long, and nobody wants the images then.
    """
    return request.model_copy(update={"deadline_s": current_caller().terms.patience_s})


def cost_of(request: GenerationRequest) -> Cost:
    """What a request uses of its key's quota."""
    work = rows_of(request) * evaluations(request) * request.width * request.height / 1e6
    return Cost(request.images, work)
