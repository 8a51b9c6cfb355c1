"""The images that were accepted and are not finished: those in the call that is being made, and those that wait."""

from __future__ import annotations

import math
from collections.abc import Iterable

from serving.errors import DeadlineError, EngineError
from serving.job import Job
from serving.scheduling import Scheduler


class Line:
    """The images that were accepted and are not finished.

    Args:
        scheduler: whose turn it is.

    Attributes:
        encoding: images of requests whose prompts are being read.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.encoding = 0
        self.jobs: list[Job] = []
        self.running: list[Job] = []

    @property
    def waiting(self) -> int:
        """Images that wait for their turn."""
        return self.encoding + len(self.jobs) - len(self.running)

    @property
    def backlog_s(self) -> float:
        """Seconds of the device that they still need."""
        return sum(self.scheduler.device_s(job) for job in self.jobs if not job.cancelled)

    def promised_s(self, by_s: float) -> float:
        """Seconds of the device that those still need whose deadline is no later."""
        wanted = (job for job in self.jobs if not job.cancelled and (job.deadline_at_s or math.inf) <= by_s)
        return sum(map(self.scheduler.device_s, wanted))

    def join(self, jobs: Iterable[Job]) -> None:
        """They wait from now on."""
        self.jobs.extend(jobs)

    def leave(self, jobs: Iterable[Job]) -> None:
        """Nobody wants them any more: those that wait are gone at once, the others when their call is over."""
        for job in jobs:
            job.cancelled = True
        self.jobs = [job for job in self.jobs if not job.cancelled or job in self.running]

    def turn(self, now_s: float) -> list[Job]:
        """Whose turn it is, once those are gone who cannot be in time any more."""
        self.jobs = [job for job in self.jobs if not job.cancelled]
        for job in self.scheduler.hopeless(self.jobs, now_s):
            self._expire(job, now_s)
        self.jobs = [job for job in self.jobs if not job.cancelled]
        self.running = self.scheduler.choose(self.jobs)
        return self.running

    def over(self, *, lost: Iterable[Job] = ()) -> None:
        """The call is over: who is finished leaves, and who was lost in it."""
        gone = set(lost)
        self.jobs = [job for job in self.jobs if not job.row.trajectory.finished and job not in gone]
        self.running = []

    def stop(self, error: EngineError) -> None:
        """Everybody leaves, and is told why."""
        for job in self.jobs:
            job.outbox.put_nowait(error)
        self.jobs, self.running = [], []

    def _expire(self, late: Job, now_s: float) -> None:
        """A request that cannot be in time any more frees its rows for those that can."""
        if late.cancelled:
            return
        needed_s = now_s - late.arrived_s + self.scheduler.seconds_left(late)
        late.outbox.put_nowait(DeadlineError(late.request.deadline_s or math.inf, needed_s))
        for job in self.jobs:
            job.cancelled |= job.outbox is late.outbox
