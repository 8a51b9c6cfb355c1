"""One replica's work on one job: from its claim to the last try of its webhook."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime

from serving.envelope import ApiError, from_error
from serving.errors import EngineError, QueueFullError, WorkLimitError
from serving.jobs_config import JobsConfig
from serving.jobs_lease import Lease
from serving.jobs_record import JobRecord, JobState, status_of
from serving.jobs_schemas import JobStatus, Status, WebhookEvent
from serving.jobs_store import JobStore
from serving.schemas import Event, GenerationRequest, ImageReady, Progress
from serving.studio import Studio
from serving.webhook import WebhookSecrets, deliver
from training.errors import DarkroomError

PROGRESS_S = 0.5
"""Between two writes of how far a job is."""
_BEATS = 4
"""Signs of life in the time of a lease."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Workshop:
    """What work is done with.

    Attributes:
        studio: makes the images.
        store: where the jobs are.
        config: how they are kept.
        secrets: of webhooks; None calls none.
    """

    studio: Studio
    store: JobStore
    config: JobsConfig
    secrets: WebhookSecrets | None


class Work:
    """One replica's work on one job.

    Args:
        record: the job.
        lease: this replica's claim on it.
        shop: what it is done with.
        refusal: why the job has failed without any work; None where it has not.

    Attributes:
        cancelled: set to end the job.
        made: set once nothing more is made of it here.
    """

    def __init__(self, record: JobRecord, lease: Lease, shop: Workshop, refusal: ApiError | None = None) -> None:
        self.cancelled = asyncio.Event()
        self.made = asyncio.Event()
        self._record = record
        self._lease = lease
        self._shop = shop
        self._refusal = refusal
        self._lost = asyncio.Event()
        self._state = JobState()
        self._steps: dict[int, int] = {}

    async def run(self, asked: GenerationRequest | None, events: AsyncGenerator[Event, None] | None) -> None:
        """Work until nothing is left to do, or until the job is another replica's.

        Args:
            asked: the request.
            events: of that request, which the engine has accepted. Both None take over what another replica left.
        """
        beating = asyncio.create_task(self._beat())
        try:
            found = await asyncio.to_thread(self._shop.store.state, self._record.id)
            self._state = found or self._state
            if not self._state.ended and self._refusal is not None:
                await self._end("failed", self._refusal)
            elif not self._state.ended:
                await self._make(asked, events)
            self.made.set()
            if self._state.webhook == "pending":
                await self._call()
        except FileNotFoundError:  # whoever collects jobs took it
            log.info("%s is gone", self._record.id)
        finally:
            self.made.set()
            beating.cancel()
            await asyncio.to_thread(self._lease.release)

    async def _beat(self) -> None:
        """Show signs of life; see whether the job shall end, and whether it is another replica's by now."""
        while True:
            if not await asyncio.to_thread(self._lease.renew):
                self._lost.set()
                return
            if await asyncio.to_thread(self._shop.store.cancelling, self._record.id):
                self.cancelled.set()
            await asyncio.sleep(self._shop.config.lease_s / _BEATS)

    async def _make(self, asked: GenerationRequest | None, events: AsyncGenerator[Event, None] | None) -> None:
        """Follow the engine to the job's end. A job that is lost here is left as it is: another replica goes on."""
        following = asyncio.create_task(self._follow(asked, events))
        ending = [asyncio.create_task(each.wait()) for each in (self.cancelled, self._lost)]
        try:
            await asyncio.wait({following, *ending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (following, *ending):
                task.cancel()
            await asyncio.wait([following])  # its rows are free
            if events is not None:
                await events.aclose()  # also where the following was ended before it began
        if self._lost.is_set():
            return
        error = None if following.cancelled() else following.exception()
        if following.cancelled():
            await self._end("cancelled", None)
        elif error is None:
            await self._end("succeeded", None)
        elif isinstance(error, FileNotFoundError):
            raise error
        elif isinstance(error, EngineError) and self._lease.attempt < self._shop.config.max_attempts:
            log.warning("%s is left to another attempt: %s", self._record.id, error.message)
        else:
            await self._end("failed", _told(self._record.id, error))

    async def _follow(self, asked: GenerationRequest | None, events: AsyncGenerator[Event, None] | None) -> None:
        if asked is None or events is None:
            asked, events = await self._again()
        written_s = 0.0
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Progress):
                    self._steps[event.index] = event.step
                    if time.monotonic() - written_s >= PROGRESS_S:
                        written_s = time.monotonic()
                        await self._tell_progress()
                elif isinstance(event, ImageReady):
                    await self._keep(event, asked)

    async def _again(self) -> tuple[GenerationRequest, AsyncGenerator[Event, None]]:
        """Ask the engine for what another replica did not finish, as often as it takes; its seeds are the same."""
        pictures = await asyncio.to_thread(self._shop.store.pictures, self._record)
        while True:
            asked = self._record.asked(*pictures, time.time())
            events = self._shop.studio.submit(asked)
            try:
                await anext(events)
            except (QueueFullError, WorkLimitError) as busy:
                await asyncio.sleep(busy.retry_after_s)
            else:
                return asked, events

    async def _keep(self, event: ImageReady, asked: GenerationRequest) -> None:
        record, store = self._record, self._shop.store
        made = await self._shop.studio.file(event, asked, record.output_format, quality=record.quality)
        image = await asyncio.to_thread(store.add_image, record.id, event.index, event.seed, made.file)
        known = image.index in {each.index for each in self._state.images}
        await self._write(self._state.with_image(image))
        if not known:
            await asyncio.to_thread(store.tell, record.id, "image", image.model_dump())

    async def _tell_progress(self) -> None:
        await self._write(self._state.model_copy(update={"status": "running", "steps_done": sum(self._steps.values())}))
        told = {"progress": self._status().progress}
        await asyncio.to_thread(self._shop.store.tell, self._record.id, "progress", told)

    async def _end(self, status: Status, error: ApiError | None) -> None:
        update = {
            "status": status,
            "error": None if error is None else error.body,
            "ended_s": time.time(),
            "steps_done": sum(self._steps.values()),
            "webhook": None if self._record.webhook_url is None else "pending",
        }
        await self._write(self._state.model_copy(update=update))
        await asyncio.to_thread(self._shop.store.tell, self._record.id, status, {"status": status})

    async def _call(self) -> None:
        """Tell the webhook of the end, until it listens or the last try is over."""
        status = self._status()
        moment = datetime.now(UTC).isoformat(timespec="seconds")
        event = WebhookEvent.model_validate({"type": f"job.{status.status}", "timestamp": moment, "data": status})
        delivered = False
        for pause_s in (0.0, *self._shop.config.webhook_pauses_s):
            if await self._lost_within(pause_s):
                return
            if delivered := await self._deliver(event.model_dump_json().encode()):
                break
        outcome = "delivered" if delivered else "failed"
        await self._write(self._state.model_copy(update={"webhook": outcome}))

    async def _deliver(self, body: bytes) -> bool:
        record, secrets = self._record, self._shop.secrets
        if record.webhook_url is None or secrets is None:
            return False
        private = self._shop.config.webhook_private
        return await deliver(record.webhook_url, record.id, body, secrets.of(record.key), private=private)

    async def _lost_within(self, seconds: float) -> bool:
        """Wait; whether the job became another replica's meanwhile."""
        try:
            async with asyncio.timeout(seconds):
                await self._lost.wait()
        except TimeoutError:
            return False
        return True

    async def _write(self, state: JobState) -> None:
        self._state = state
        await asyncio.to_thread(self._shop.store.write_state, self._record.id, state)

    def _status(self) -> JobStatus:
        return status_of(self._record, self._state, cancelling=False, kept_s=self._shop.config.results_kept_s)


def _told(job_id: str, error: BaseException) -> ApiError:
    """What a job's owner is told of why it failed; a defect is for the log."""
    if isinstance(error, DarkroomError):
        return from_error(error)
    log.error("defect in %s", job_id, exc_info=error)
    return ApiError(500, "The server has a defect; its log names it.", code="internal_error")
