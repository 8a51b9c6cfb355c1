"""The jobs of a deployment, as one replica sees them.

They live in a folder that all replicas share (``serving.jobs_store``): any of them answers for any job, and each works
on those that it accepted. What survives a replica's death: the job, its finished images, and its request with its
seeds, from which another replica that has the same weights makes the rest, bit for bit, once the dead one's lease is
over. What does not: the steps of images that were being made. Without a shared folder (``JobsConfig.folder``) nothing
survives, and only one replica may run.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from serving.caller import Caller, acting_for
from serving.envelope import ApiError
from serving.errors import JobsFullError
from serving.idempotency import IdempotencyKeys, Made, require_same
from serving.jobs_collecting import collect
from serving.jobs_config import JobsConfig
from serving.jobs_lease import Lease
from serving.jobs_record import JobRecord, JobState, status_of
from serving.jobs_schemas import ENDS, JobStatus
from serving.jobs_store import JobEvent, JobStore
from serving.jobs_work import Work, Workshop
from serving.lost import lost
from serving.schemas import Event, GenerationRequest
from serving.studio import Studio
from serving.terms import Terms
from serving.webhook import WebhookSecrets

POLL_S = 0.1
"""Between two looks at the events of a job, which may be another replica's."""
_COLLECT_S = 60.0
"""Between two collections, at most."""
_OTHER_MODEL = 10
"""Leases after which nobody who has its weights is expected any more, and a job has failed."""
_CANCEL_S = 5.0
"""How long the answer to a cancellation waits for it."""

log = logging.getLogger(__name__)


class Jobs:
    """The jobs. Use it as ``async with jobs:``, inside the studio's.

    Args:
        studio: makes the images.
        config: how jobs are kept.

    Raises:
        ConfigError: the webhook secret cannot be used.
    """

    def __init__(self, studio: Studio, config: JobsConfig) -> None:
        self.config = config
        self.secrets = None if config.webhook_secret is None else WebhookSecrets(Path(config.webhook_secret))
        self._studio = studio
        self._works: dict[str, Work] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = ExitStack()
        self._bytes = 0
        self._collect_at_s = 0.0

    async def __aenter__(self) -> Self:
        folder = self.config.folder
        if folder is None:
            folder = self._closing.enter_context(tempfile.TemporaryDirectory(prefix="darkroom-jobs-"))
        self._store = JobStore(Path(folder).expanduser())
        self._keys = IdempotencyKeys(self._store.folder / "idempotency")
        self._shop = Workshop(self._studio, self._store, self.config, self.secrets)
        self._sweeping = asyncio.create_task(self._sweep(), name="jobs")
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Leave what is unfinished to the other replicas."""
        tasks = [self._sweeping, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await asyncio.to_thread(self._closing.close)

    async def submit(self, record: JobRecord, asked: GenerationRequest, body_sha256: str) -> tuple[JobStatus, bool]:
        """Accept a job, or find the one that the same idempotency key has made.

        Args:
            record: the job.
            asked: its request, with the picture that it starts from.
            body_sha256: of what the client sent.

        Returns:
            Where it is, and whether it was here before.

        Raises:
            ApiError: its idempotency key was used otherwise.
            DarkroomError: it is refused, as any request would be.
        """
        if record.idempotency is not None:
            made = Made(record.id, body_sha256)
            used = await asyncio.to_thread(self._keys.use, record.idempotency, made)
            if used.job_id != record.id:
                require_same(used, body_sha256)
                return await self._made_before(used.job_id, record), True
        try:
            return await self._accept(record, asked), False
        except BaseException:
            if record.idempotency is not None:
                await asyncio.to_thread(self._keys.forget, record.idempotency)
            raise

    async def _accept(self, record: JobRecord, asked: GenerationRequest) -> JobStatus:
        await self._require_room()
        events = self._studio.submit(asked)
        await anext(events)
        try:
            await asyncio.to_thread(self._store.create, record, asked.start, JobState())
            lease = await asyncio.to_thread(Lease.claim, self._store.folder / record.id, self.config.lease_s)
        except OSError as error:
            await events.aclose()
            raise lost("The job cannot be kept now.", error) from error
        except BaseException:
            await events.aclose()
            raise
        if lease is None:  # this thread of ours slept for so long that another replica has it
            await events.aclose()
        else:
            self._begin(record, lease, asked, events)
        return status_of(record, JobState(), cancelling=False, kept_s=self.config.results_kept_s)

    async def _made_before(self, job_id: str, again: JobRecord) -> JobStatus:
        status = await self.status(job_id, again.key)
        if status is None:
            await asyncio.to_thread(self._keys.forget_orphan, str(again.idempotency), self.config.lease_s)
            message = "The first request with this Idempotency-Key is still being looked at.\n  mend:    ask again"
            raise ApiError(409, message, code="idempotency_key_in_use", headers={"Retry-After": "1"})
        return status

    async def _require_room(self) -> None:
        if self._bytes <= self.config.max_bytes:
            return
        await self._collect()
        if self._bytes > self.config.max_bytes:
            raise JobsFullError(self._bytes, self.config.max_bytes)

    async def find(self, job_id: str, key: str | None) -> JobRecord | None:
        """A job; None where there is none that this API key may see."""
        record = await asyncio.to_thread(self._store.record, job_id)
        return record if record is not None and record.key == key else None

    async def status(self, job_id: str, key: str | None) -> JobStatus | None:
        """Where a job is; None where there is none that this API key may see."""
        record = await self.find(job_id, key)
        state = None if record is None else await asyncio.to_thread(self._store.state, job_id)
        if record is None or state is None:
            return None
        cancelling = await asyncio.to_thread(self._store.cancelling, job_id)
        return status_of(record, state, cancelling=cancelling, kept_s=self.config.results_kept_s)

    async def image(self, job_id: str, index: int) -> bytes | None:
        """The file of a finished image."""
        return await asyncio.to_thread(self._store.image, job_id, index)

    async def cancel(self, job_id: str) -> None:
        """End a job: within a step where this replica works on it, else when the one that does looks next."""
        try:
            await asyncio.to_thread(self._store.cancel, job_id)
        except FileNotFoundError:  # it was forgotten meanwhile
            return
        work = self._works.get(job_id)
        if work is not None:
            work.cancelled.set()
            waiting = asyncio.create_task(work.made.wait())
            await asyncio.wait([waiting], timeout=_CANCEL_S)
            waiting.cancel()

    async def events(self, job_id: str, after: int) -> AsyncIterator[JobEvent | None]:
        """What happens to a job, to its end; None whenever nothing new is there yet.

        Args:
            job_id: a job that is there.
            after: the number of the last event that is known.
        """
        while True:
            state = await asyncio.to_thread(self._store.state, job_id)
            found = await asyncio.to_thread(self._store.events, job_id, after)
            for event in found:
                after = event.number
                yield event
                if event.kind in ENDS:
                    return
            if state is None:
                return
            if state.ended:  # its replica died before it could tell
                yield JobEvent(after + 1, state.status, f'{{"status": "{state.status}"}}')
                return
            yield None
            await asyncio.sleep(POLL_S)

    async def over(self, job_id: str, after: int) -> bool:
        """Whether a job has ended and nothing happened after the event of that number."""
        state = await asyncio.to_thread(self._store.state, job_id)
        told = await asyncio.to_thread(self._store.events, job_id, 0)
        return state is not None and state.ended and bool(told) and after >= told[-1].number and told[-1].kind in ENDS

    def _begin(
        self,
        record: JobRecord,
        lease: Lease,
        asked: GenerationRequest | None = None,
        events: AsyncGenerator[Event, None] | None = None,
        refusal: ApiError | None = None,
    ) -> None:
        work = Work(record, lease, self._shop, refusal)
        self._works[record.id] = work
        terms = Terms(priority=record.request.priority, charged=False)
        with acting_for(Caller("jobs", record.id, record.key, terms)):
            task = asyncio.create_task(work.run(asked, events), name=record.id)
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._over(task, record.id))

    def _over(self, task: asyncio.Task[None], job_id: str) -> None:
        self._tasks.discard(task)
        del self._works[job_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the work on %s broke; another attempt follows", job_id, exc_info=error)

    async def _sweep(self) -> None:
        """Take over what dead replicas left, and forget what is due; for ever."""
        while True:
            try:
                for job_id in await asyncio.to_thread(self._store.active):
                    if job_id not in self._works and self._studio.engine.ready:
                        await self._take_over(job_id)
                if time.monotonic() >= self._collect_at_s:
                    await self._collect()
            except Exception:
                log.exception("the jobs cannot be looked after now")
            await asyncio.sleep(self.config.lease_s / 2)

    async def _take_over(self, job_id: str) -> None:
        record = await asyncio.to_thread(self._store.record, job_id)
        if record is None:
            await asyncio.to_thread(self._store.remove, job_id)
            return
        ours = record.bundle_sha256 == self._studio.card.bundle_sha256
        lease_s = self.config.lease_s * (1 if ours else _OTHER_MODEL)
        lease = await asyncio.to_thread(Lease.claim, self._store.folder / job_id, lease_s)
        if lease is None:
            return
        log.warning("%s is taken over, attempt %d", job_id, lease.attempt)
        refusal = None
        if not ours:
            refusal = ApiError(503, f"No replica serves this job's model any more: {record.model}.", code="model_gone")
        elif lease.attempt > self.config.max_attempts:
            tries = f"{self.config.max_attempts} replicas were lost over this job."
            refusal = ApiError(500, tries, code="attempts_exhausted")
        self._begin(record, lease, refusal=refusal)

    async def _collect(self) -> None:
        self._collect_at_s = time.monotonic() + min(_COLLECT_S, self.config.results_kept_s / 4)
        self._bytes = await asyncio.to_thread(collect, self._store, self._keys, self.config, time.time())
