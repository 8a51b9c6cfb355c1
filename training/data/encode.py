"""Encoding a data set: a task per image shard, done once, wherever there is a process for it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np

from training import noise
from training.data.dataset import Dataset, Split
from training.data.encoded.cache import Cache, sweep
from training.data.encoded.tick import Tick
from training.data.executor import Executor, Failure, attempt
from training.data.manifest import SPLITS, SplitName
from training.errors import DataError

_NAMED = 5
"""Shards that a message names."""


class Job(Protocol):
    """One kind of encoding with all that it depends on; ``TextJob`` and ``LatentsJob`` are such. It can be pickled."""

    @property
    def kind(self) -> str:
        """``"text"`` or ``"latents"``."""
        ...

    def cache(self, dataset: Dataset, split: SplitName) -> Cache:
        """Where the values of a split are kept."""
        ...

    def encode(self, cache: Cache, number: int, split: Split, tick: Tick) -> int:
        """Encode one image shard; returns how many samples could not be read."""
        ...


@dataclass(frozen=True)
class Task:
    """One image shard to encode.

    Attributes:
        place: of the data set.
        data_hash: its name.
        job: what to make of it.
        split: the shard's split.
        number: the shard.
        name: the shard's file name.
        samples: in the shard.
        share: put the file beside the images too, where those lie behind a network.
    """

    place: str
    data_hash: str
    job: Job
    split: SplitName
    number: int
    name: str
    samples: int
    share: bool = False

    @property
    def seconds(self) -> float:
        """How long it takes, roughly: a picture or a caption at a hundred a second, after the encoder was loaded."""
        return 1.0 + 0.01 * self.samples

    def describe(self) -> str:
        """What it is, for an error."""
        return f"encoding {self.name}"


def do(task: Task, threads: int = 0) -> int:
    """Do one task in a process of an executor; the data set and the encoder stay open for the next one.

    Args:
        task: which.
        threads: for torch, where processes share the cores; 0 leaves it as it is.

    Returns:
        Samples that could not be read; they have empty values.

    Raises:
        DataError: the data set is gone, or another one now.
        ConfigError: the encoder cannot be loaded.
        StorageError: storage answers with errors.
    """
    if threads:
        import torch

        torch.set_num_threads(threads)
    return _encode(_opened(task.place, task.data_hash), task)


def _encode(dataset: Dataset, task: Task, tick: Tick = lambda _: None) -> int:
    cache = task.job.cache(dataset, task.split)
    unreadable = task.job.encode(cache, task.number, dataset.split(task.split), tick)
    if task.share:
        cache.share(task.number)
    return unreadable


@lru_cache(maxsize=1)
def _opened(place: str, data_hash: str) -> Dataset:
    dataset = Dataset.open(place)
    if dataset.hash != data_hash:
        raise DataError(
            "The data set was changed while it was encoded.",
            value=f"{place}: {dataset.hash}",
            rule=f"data hash {data_hash}",
            mend="the same command again encodes what is there now",
        )
    return dataset


@dataclass(frozen=True)
class Encoded:
    """What ``encode`` found and did.

    Attributes:
        kind: of the job.
        folders: where the files lie, and what they are.
        shards: image shards that were looked at.
        made: those that had to be encoded.
        unreadable: samples of those that could not be read.
        removed: files that were removed, for they belonged to nothing that is there.
    """

    kind: str
    folders: Mapping[str, Mapping[str, Any]]
    shards: int
    made: int
    unreadable: int
    removed: int


class _Tally:
    """Counts samples towards the whole, and shards."""

    def __init__(self, total: int, progress: Callable[[int, int], None]) -> None:
        self.done, self.total, self.told = 0, total, progress
        self.made = self.unreadable = 0
        self.failures: list[str] = []
        progress(0, total)

    def tick(self, samples: int) -> None:
        self.done += samples
        self.told(self.done, self.total)


def encode(
    dataset: Dataset,
    job: Job,
    *,
    executor: Executor | None = None,
    threads: int = 0,
    thorough: bool = False,
    share: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Encoded:
    """Encode what is not encoded yet. Whole files are left alone, so that the same call again goes on.

    Args:
        dataset: what to encode.
        job: how.
        executor: who does it; this process, if none is given.
        threads: for torch in each of the executor's processes; 0 leaves it to torch.
        thorough: compare the files that are there with their checksums, and not their sizes alone.
        share: put the files beside the images too, where those lie behind a network.
        progress: told (samples done, in all).

    Raises:
        ConfigError: the encoder cannot be loaded.
        DataError: shards could not be encoded; all others are.
        StorageError: storage answers with errors; what was encoded stays.
    """
    caches = {split: job.cache(dataset, split) for split in SPLITS}
    names = {name for split in dataset.manifest.splits.values() for name in split.shards}
    folders = {cache.place.path: cache.about for cache in caches.values()}
    removed = sum(len(sweep(folder, names)) for folder in folders)
    tally = _Tally(sum(split.count for split in dataset.manifest.splits.values()), progress)

    def missing() -> Iterator[Task]:
        for split, cache in caches.items():
            for number in range(len(cache.shards)):
                if cache.find(number, thorough=thorough) is None:
                    yield _task(dataset, job, split, cache, number, share=share)
                else:
                    tally.tick(cache.shards[number].count)

    def here() -> Iterator[tuple[Task, int | Failure]]:
        for task in missing():
            yield task, attempt(partial(_encode, dataset, tick=tally.tick), task)

    for task, outcome in here() if executor is None else executor.run(partial(do, threads=threads), missing()):
        if isinstance(outcome, Failure):
            tally.failures.append(f"{task.name}: {outcome.reason}")
            continue
        tally.made, tally.unreadable = tally.made + 1, tally.unreadable + outcome
        if executor is not None:
            tally.tick(task.samples)
    if tally.failures:
        raise DataError(
            f"{len(tally.failures)} image shards could not be encoded; all others are.",
            value=str(dataset.path),
            rule="; ".join(tally.failures[:_NAMED]),
            mend="see to the cause, then the same command again tries these",
        )
    shards = sum(len(cache.shards) for cache in caches.values())
    told = {str(folder): about for folder, about in folders.items()}
    return Encoded(job.kind, told, shards, tally.made, tally.unreadable, removed)


def _task(dataset: Dataset, job: Job, split: SplitName, cache: Cache, number: int, *, share: bool = False) -> Task:
    shard = cache.shards[number]
    return Task(str(dataset.path), dataset.hash, job, split, number, shard.name, shard.count, share)


def ensure(
    dataset: Dataset,
    split: SplitName,
    job: Job,
    *,
    part: int = 0,
    parts: int = 1,
    tick: Tick = lambda _: None,
) -> Iterator[bool]:
    """Encode what is missing of a split, of each ``parts`` shards the one at ``part``, a shard each time it is asked.

    Every process takes the shards in an order of its own, and looks for each right before: the trials of a sweep,
    which begin together and want the same, share the work instead of all doing all of it.

    Args:
        dataset: what to encode.
        split: of it.
        job: how.
        part: which share.
        parts: shares in all.
        tick: told of samples that are done, or were.

    Yields:
        For each shard, whether it was missing.

    Raises:
        ConfigError: the encoder cannot be loaded.
        StorageError: storage answers with errors.
    """
    cache = job.cache(dataset, split)
    drawn = noise.generator(os.getpid(), socket.gethostname(), "encode")
    for number in drawn.permutation(np.arange(part, len(cache.shards), parts)).tolist():
        missing = cache.find(number) is None
        if missing:
            _encode(dataset, _task(dataset, job, split, cache, number), tick)
        else:
            tick(cache.shards[number].count)
        yield missing
