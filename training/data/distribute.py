"""The wiring to Ray Data: a stage's jobs on the actors of a cluster."""

from __future__ import annotations

import itertools
import logging
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayError, RayTaskError
from ray.util.annotations import RayDeprecationWarning

from training.data.executor import Failure, Job, Result, attempt
from training.data.findings import describe
from training.errors import DarkroomError, StackError

_JOBS_PER_ACTOR = 32
"""Of one round: opening the models again for the next one is then a small part of it."""

_MAX_JOBS = 4096
"""Of one round: its inputs are in the driver's memory, about 0.5 MB a job."""

_RETRIES = 1
"""How often Ray does a job again whose actor died, before all that is left of the round is done job by job."""


class RayExecutor:
    """Ray Data's actors, each with the models of its rules open; nodes may be lost meanwhile.

    Args:
        actors: how many; by default one per CPU of the cluster.
    """

    def __init__(self, actors: int | None = None) -> None:
        self._actors = actors

    def run(
        self, work: Callable[[Job], Result], jobs: Iterable[Job], *, apart: bool = True
    ) -> Iterator[tuple[Job, Result | Failure]]:
        """See ``Executor``.

        Raises:
            StackError: the cluster is lost.
        """
        del apart  # jobs never run in the driver
        coming = iter(jobs)
        try:
            actors = self._actors or max(1, int(ray.cluster_resources().get("CPU", 1)))
            while jobs_now := list(itertools.islice(coming, min(_MAX_JOBS, actors * _JOBS_PER_ACTOR))):
                left = dict(enumerate(jobs_now))
                for place, outcome in _done(pickle.dumps(work), left, min(actors, len(left))):
                    yield left.pop(place), _opened(outcome)
        except (RayError, ConnectionError) as error:
            raise StackError(
                "The Ray cluster was lost.",
                rule=describe(error),
                mend="run the same command again: it goes on where it stopped",
            ) from error


def _done(work: bytes, left: dict[int, Any], actors: int) -> Iterator[tuple[int, bytes]]:
    """The outcomes of one round, by place; the caller takes from ``left`` what it has."""
    try:
        yield from _by_actors(work, left, actors)
    except RayError as error:
        logging.getLogger(__name__).warning("%d jobs are done one by one: %s", len(left), describe(error))
        yield from _one_by_one(work, dict(left))


def _by_actors(work: bytes, jobs: dict[int, Any], actors: int) -> Iterator[tuple[int, bytes]]:
    items = [{"place": place, "job": pickle.dumps(job)} for place, job in jobs.items()]
    rows = ray.data.from_items(items, override_num_blocks=len(items))
    rows.context.enable_progress_bars = False
    rows.context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # for retries there are no other parameters yet
        outcomes = rows.map_batches(
            _Actor,
            fn_constructor_args=(work,),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
            num_cpus=1,
            max_restarts=_RETRIES * actors,
            max_task_retries=_RETRIES,
        )
    batch: pa.Table
    for batch in outcomes.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from zip(batch["place"].to_pylist(), batch["outcome"].to_pylist(), strict=True)


class _Actor:
    """Does jobs; what it opened for one it has for the next."""

    def __init__(self, work: bytes) -> None:
        self._work = pickle.loads(work)  # noqa: S301 - from our own driver

    def __call__(self, batch: pa.Table) -> pa.Table:
        outcomes = [_outcome(self._work, job.as_py()) for job in batch["job"]]
        return pa.table({"place": batch["place"], "outcome": pa.array(outcomes, pa.binary())})


def _one_by_one(work: bytes, jobs: dict[int, Any]) -> Iterator[tuple[int, bytes]]:
    """Each job in a task of its own, so that one which kills its process is known by that."""
    task: Any = ray.remote(num_cpus=1, max_retries=0)(_task)
    running = {task.remote(work, pickle.dumps(job)): place for place, job in jobs.items()}
    while running:
        (ready,), _ = ray.wait(list(running))
        place = running.pop(ready)
        try:
            yield place, ray.get(ready)
        except RayTaskError as error:  # a fault of ours, or a job that this cluster cannot even read
            yield place, pickle.dumps(Failure(describe(error.cause)))
        except RayError as error:
            yield place, pickle.dumps(Failure(describe(error), died=True))


def _task(work: bytes, job: bytes) -> bytes:
    return _outcome(pickle.loads(work), job)  # noqa: S301 - as above


def _outcome(work: Any, job: bytes) -> bytes:
    """What became of a job, or the error that ends the build."""
    try:
        return pickle.dumps(attempt(work, pickle.loads(job)))  # noqa: S301 - as above
    except (DarkroomError, OSError) as error:
        return pickle.dumps(error)


def _opened(outcome: bytes) -> Any:
    found = pickle.loads(outcome)  # noqa: S301 - as above
    if isinstance(found, DarkroomError | OSError):
        raise found
    return found
