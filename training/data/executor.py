"""Runs a stage's jobs on the cores of this machine: in their order or another one, with the same result."""

from __future__ import annotations

import itertools
import logging
import os
import queue
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from training.data.entries import printable
from training.data.findings import describe
from training.data.job_worker import JobWorker, WorkerDiedError
from training.errors import DarkroomError, DataError

_log = logging.getLogger(__name__)

_MEMORY_PER_WORKER = 1_500_000_000
"""Bytes: decoding one picture of the default ``max_pixels`` takes most of it."""

_WORTH_PROCESSES_S = 1.5
"""Less work than this is done before other processes have started."""

_NAMED = 5
"""Failed jobs that an error names."""


class AnyJob(Protocol):
    """A part of a stage."""

    @property
    def seconds(self) -> float:
        """How long it takes, roughly."""

    def describe(self) -> str:
        """What it is, in a few words, for an error."""


Job = TypeVar("Job", bound=AnyJob)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Failure:
    """A job that failed twice.

    Attributes:
        reason: what was raised, or that the process died.
        died: the process died, so that any input of the job may have killed it.
    """

    reason: str
    died: bool = False


class Executor(Protocol):
    """Where the jobs of a stage run."""

    def run(
        self, work: Callable[[Job], Result], jobs: Iterable[Job], *, apart: bool = False
    ) -> Iterator[tuple[Job, Result | Failure]]:
        """Do all jobs, a bounded number at a time, in any order; a job that fails is tried once more.

        Args:
            work: pure and picklable: doing a job twice does no harm.
            jobs: drawn as workers become free.
            apart: never in this process, which a job may kill.

        Raises:
            DarkroomError: what ``work`` says is wrong with more than the one job.
            OSError: likewise: a full disk, for instance.
        """


def attempt(work: Callable[[Job], Result], job: Job) -> Result | Failure:
    """One job, twice if need be; only what concerns more than the job is raised."""
    try:
        return work(job)
    except (DarkroomError, OSError):
        raise
    except Exception as error:  # noqa: BLE001 - whatever is wrong with one job must not end the others
        _log.warning("%s: tried once more after %s", job.describe(), describe(error))
    try:
        return work(job)
    except (DarkroomError, OSError):
        raise
    except Exception as error:  # noqa: BLE001 - as above
        return Failure(describe(error))


def all_done(
    executor: Executor,
    work: Callable[[Job], Result],
    jobs: Iterable[Job],
    rescue: Callable[[Job], Result | Failure] | None = None,
    *,
    apart: bool = False,
) -> Iterator[tuple[Job, Result]]:
    """Do all jobs; those that fail whatever is tried are named when all others are done.

    Args:
        executor: where.
        work: pure and picklable.
        jobs: drawn as workers become free.
        rescue: tried on a job that kills its process.
        apart: never in this process.

    Raises:
        DataError: naming the failed ones.
    """
    failed: list[tuple[Job, Failure]] = []
    for job, outcome in executor.run(work, jobs, apart=apart):
        result = rescue(job) if rescue and isinstance(outcome, Failure) and outcome.died else outcome
        if isinstance(result, Failure):
            failed.append((job, result))
        else:
            yield job, result
    if failed:
        lines = [f"\n           {printable(job.describe())}: {why.reason}" for job, why in failed[:_NAMED]]
        raise DataError(
            "Parts of the build failed; all others are done.",
            value=len(failed),
            rule=f"each can be done in one of two tries{''.join(lines)}",
            mend="see to the cause, then run the same command again: only these are done anew",
        )


def default_workers() -> int:
    """As many as there are cores for this process and memory for their pictures."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // _MEMORY_PER_WORKER))


class LocalExecutor:
    """Processes of this machine, for decoders release the interpreter but the rules around them do not.

    Little work is done in this process: starting others would take longer. Once started, they stay until ``close``.

    Args:
        workers: processes; by default one per core.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or default_workers()
        self._started: list[JobWorker] = []
        self._idle = queue.SimpleQueue[JobWorker]()
        weakref.finalize(self, _close_all, self._started)

    def run(
        self, work: Callable[[Job], Result], jobs: Iterable[Job], *, apart: bool = False
    ) -> Iterator[tuple[Job, Result | Failure]]:
        """See ``Executor``."""
        coming, first, seconds = iter(jobs), list[Job](), 0.0
        here = not apart and not self._started
        while here and self.workers > 1 and seconds < _WORTH_PROCESSES_S:
            job = next(coming, None)
            if job is None:
                break
            first.append(job)
            seconds += job.seconds
        if here and seconds < _WORTH_PROCESSES_S:
            yield from ((job, attempt(work, job)) for job in itertools.chain(first, coming))
        else:
            yield from self._in_processes(work, itertools.chain(first, coming))

    def close(self) -> None:
        """End the processes at once: what they were doing is lost."""
        _close_all(self._started)
        self._idle = queue.SimpleQueue()

    def _in_processes(
        self, work: Callable[[Job], Result], coming: Iterator[Job]
    ) -> Iterator[tuple[Job, Result | Failure]]:
        if not self._started:
            self._started += [JobWorker() for _ in range(self.workers)]
            for worker in self._started:
                self._idle.put(worker)
        running = dict[Future[Result | Failure], Job]()
        with ThreadPoolExecutor(self.workers, thread_name_prefix="jobs") as pool:
            try:
                while True:
                    room = 2 * self.workers - len(running)
                    do = partial(_by_one_of, self._idle, work)
                    running |= {pool.submit(do, job): job for job in itertools.islice(coming, room)}
                    if not running:
                        return
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield running.pop(future), future.result()
            finally:
                for future in running:
                    future.cancel()
                if running:
                    self.close()


def _close_all(workers: list[JobWorker]) -> None:
    while workers:
        workers.pop().close()


def _by_one_of(idle: queue.SimpleQueue[JobWorker], work: Callable[[Job], Result], job: Job) -> Result | Failure:
    worker = idle.get()
    try:
        return _twice(worker, work, job)
    finally:
        idle.put(worker)


def _twice(worker: JobWorker, work: Callable[[Job], Result], job: Job) -> Result | Failure:
    outcome: Result | Failure
    for _ in range(2):
        try:
            outcome = worker.do(work, job)
        except WorkerDiedError as error:
            outcome = Failure(str(error), died=True)
        else:
            break
    return outcome
