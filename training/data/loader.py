"""The loader: the endless stream of global batches, of which each rank reads its rows."""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from training.data.batch import Batch
from training.data.buffers import Buffers
from training.data.dataset import Dataset
from training.data.loader_config import LoaderConfig
from training.data.pixels import PixelReader, Row
from training.data.schedule import GlobalBatch, Schedule, share_of
from training.errors import ConfigError, DataError, UsageError

__all__ = ["Loader", "LoaderConfig", "Reader"]

_log = logging.getLogger(__name__)

_PART = 32
"""Rows that a thread decodes at a time, at most: few calls, and yet all threads work on the batch that comes next."""


class Reader(Protocol):
    """Turns samples into rows of a batch; threads share it."""

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Of the rows."""

    def row_shape(self, width: int, height: int) -> tuple[int, ...]:
        """Of a row for pictures of this size, channels last."""

    @property
    def cache_bytes(self) -> int:
        """The most that rows take which are kept for later epochs."""

    def read(self, sample_id: int, epoch: int, row: np.ndarray) -> Row:
        """Fill a row.

        Raises:
            DataError: the sample is damaged, for every process alike.
            StorageError: storage answers with errors, maybe to this process only.
        """


class Loader:
    """Reads one rank's rows of each global batch.

    Nothing but the position is state: two loaders of any age and any world size agree on what lies where. The stream
    has no end and no short batch: samples left over at the end of an epoch share a batch with the first of the next.

    Threads decode, for the decoders leave Python's lock alone: two of them reach what two processes reach, and no
    batch crosses a process border.

    Args:
        schedule: what each global batch holds.
        reader: how a sample becomes a row.
        rank: this process, from 0.
        world: processes in all.
        prefetch: batches decoded ahead; more are never held.
        threads: that decode; 0 for one per core.

    Attributes:
        skipped: samples met so far that cannot be read, and why. Their rows are zeros and not valid.

    Raises:
        ConfigError: there are fewer rows than ranks, or the rank is not in the world.
    """

    def __init__(
        self, schedule: Schedule, reader: Reader, *, rank: int = 0, world: int = 1, prefetch: int = 2, threads: int = 0
    ) -> None:
        _check(schedule.global_batch, rank, world)
        self.schedule = schedule
        self.rank = rank
        self.world = world
        self.prefetch = prefetch
        self.skipped: dict[int, str] = {}
        self._reader = reader
        self._lock = threading.Lock()
        self._threads = threads or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="loader")
        self._rows = share_of(schedule.global_batch, rank, world)
        self._part = max(1, min(_PART, -(-self._rows // self._threads)))
        largest = max(math.prod(reader.row_shape(each.width, each.height)) for each in schedule.members.buckets)
        self._buffers = Buffers(self._rows * largest * reader.dtype.itemsize, keep=_buffers(prefetch))

    @classmethod
    def open(
        cls,
        dataset: Dataset,
        config: LoaderConfig,
        *,
        resolution: int,
        global_batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> Loader:
        """The loader of the pictures of a data set's training split.

        Raises:
            DataError: the split is empty.
            ConfigError: as the loader itself.
            StorageError: the lists of the buckets cannot be written.
        """
        schedule = Schedule.open(dataset, config, resolution=resolution, global_batch=global_batch, seed=seed)
        reader = PixelReader(
            dataset.split("train"),
            config.augment,
            seed=seed,
            scaled=config.scaled_decoding,
            cache_mb=config.cache_mb,
        )
        return cls(schedule, reader, rank=rank, world=world, prefetch=config.prefetch, threads=config.threads)

    @property
    def buffer_bytes(self) -> int:
        """The most that batches take."""
        return self._buffers.size * _buffers(self.prefetch)

    def account(self) -> str:
        """Threads and memory, in one line for people."""
        return (
            f"each process decodes on {self._threads} threads; batches take up to {self.buffer_bytes / 1e6:.0f} MB,"
            f" kept rows up to {self._reader.cache_bytes / 1e6:.0f} MB"
        )

    def batches(self, position: int = 0) -> Iterator[Batch]:
        """This rank's batches from a place in the stream on, without end.

        Args:
            position: samples that all ranks together have consumed before: a multiple of the global batch. Any place is
                reached at once.

        Raises:
            UsageError: no batch begins at the position.
            StorageError: storage answers with errors; nothing is skipped for that, for other ranks may not see it.
        """
        number, rest = divmod(position, self.schedule.global_batch)
        if position < 0 or rest:
            raise UsageError(
                "No global batch begins at this position.",
                value=position,
                rule=f"0 or a multiple of {self.schedule.global_batch}",
            )
        return self._stream(number)

    def _stream(self, number: int) -> Iterator[Batch]:
        pending: deque[_Pending] = deque()
        try:
            for each in itertools.count(number):
                pending.append(self._begin(each))
                if len(pending) > self.prefetch:
                    yield pending.popleft().batch()
        finally:
            while pending:
                pending.popleft().cancel()

    def _begin(self, number: int) -> _Pending:
        plan = self.schedule.batch(number, self.rank, self.world)
        shape = self._reader.row_shape(plan.shape.width, plan.shape.height)
        values = self._buffers.take((self._rows, *shape), self._reader.dtype)
        rows = values.numpy()
        ids, epochs = plan.ids.tolist(), plan.epochs.tolist()
        parts = []
        for start in range(0, self._rows, self._part):
            part = slice(start, start + self._part)
            parts.append(self._pool.submit(self._read, ids[part], epochs[part], rows[part]))
        return _Pending(plan, ids, epochs, values, parts)

    def _read(self, ids: list[int], epochs: list[int], rows: np.ndarray) -> list[Row | None]:
        return [self._row(*each) for each in zip(ids, epochs, rows, strict=True)]

    def _row(self, sample_id: int, epoch: int, row: np.ndarray) -> Row | None:
        """None where the sample cannot be read: no other moves, and no other is read twice."""
        try:
            return self._reader.read(sample_id, epoch, row)
        except DataError as error:
            self._skip(sample_id, error)
            row[:] = 0
            return None

    def _skip(self, sample_id: int, error: DataError) -> None:
        with self._lock:
            first = sample_id not in self.skipped
            self.skipped[sample_id] = error.rule or error.message
        if first:
            _log.warning("Sample %d is left out, for it cannot be read: %s", sample_id, error.rule)

    def close(self) -> None:
        """Stop the threads; rows in work are finished and dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class _Pending:
    """A batch that threads are working on."""

    plan: GlobalBatch
    ids: list[int]
    epochs: list[int]
    values: torch.Tensor
    parts: list[Future[list[Row | None]]]

    def batch(self) -> Batch:
        """Wait for it."""
        rows = [row for part in self.parts for row in part.result()]
        return Batch(
            images=self.values.permute(0, 3, 1, 2),
            captions=tuple(row.caption if row else "" for row in rows),
            sample_ids=tuple(self.ids),
            epochs=tuple(self.epochs),
            position=self.plan.position,
            valid=tuple(row is not None for row in rows),
            bucket=self.plan.bucket,
            sizes=torch.from_numpy(np.array([row.sizes if row else (0,) * 6 for row in rows], dtype=np.int32)),
        )

    def cancel(self) -> None:
        """Leave what no thread has begun."""
        for part in self.parts:
            part.cancel()


def _buffers(prefetch: int) -> int:
    """Batches in memory at most: decoded ahead, in use, handed over, and let go but for a thread's last moment."""
    return prefetch + 3


def _check(global_batch: int, rank: int, world: int) -> None:
    if world < 1 or not 0 <= rank < world:
        raise ConfigError("The rank is not in the world.", value=(rank, world), rule="0 <= rank < world")
    if global_batch < world:
        raise ConfigError(
            "The global batch has fewer rows than there are workers.",
            value=global_batch,
            rule=f"global_batch >= {world}, the number of workers",
        )
