"""The loader: the endless stream of global batches, of which each rank reads its rows."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from training.data.batch import Batch
from training.data.dataset import Dataset, Split
from training.data.decode import square
from training.data.loader_config import LoaderConfig
from training.data.order import order
from training.errors import ConfigError, DataError, UsageError

__all__ = ["Loader", "LoaderConfig"]

_log = logging.getLogger(__name__)

_NEIGHBOURS = 64
"""Samples tried in place of an unreadable one; when as many are unreadable in a row, the data set is gone."""

Decoded = tuple[np.ndarray, str]
"""``[resolution, resolution, 3]`` uint8 and the caption."""


class Loader:
    """Reads one rank's rows of each global batch, in the order that seed and epoch name.

    Nothing but the position is state: two loaders of any age and any world size agree on what lies where.

    Args:
        split: what to read.
        resolution: pictures are cut to their centre square and resized to this side, in pixels.
        global_batch: rows of all ranks together.
        seed: names the order.
        rank: this process, from 0.
        world: processes in all.
        prefetch: batches decoded ahead; more are never held.
        cache_mb: memory for decoded pictures, in megabytes.

    Attributes:
        skipped: damaged samples met so far and why; each was replaced by the next readable sample.

    Raises:
        DataError: the split is empty.
        ConfigError: the global batch cannot be shared equally, or the rank is not in the world.
    """

    def __init__(
        self,
        split: Split,
        *,
        resolution: int,
        global_batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        prefetch: int = 2,
        cache_mb: int = 256,
    ) -> None:
        _check(split, resolution, global_batch, rank, world)
        self.split = split
        self.resolution = resolution
        self.global_batch = global_batch
        self.seed = seed
        self.rank = rank
        self.world = world
        self.prefetch = max(1, prefetch)
        self.skipped: dict[int, str] = {}
        self._cache: dict[int, Decoded] = {}
        self._cache_size = cache_mb * 1_000_000 // (resolution * resolution * 3)
        self._lock = threading.Lock()
        workers = min(self.prefetch, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")

    @classmethod
    def open(
        cls, config: LoaderConfig, *, resolution: int, global_batch: int, seed: int, rank: int = 0, world: int = 1
    ) -> Loader:
        """The loader of a data set's training split.

        Raises:
            DataError: no data set there, or an empty one.
            ConfigError: as the loader itself.
        """
        return cls(
            Dataset.open(config.path).split("train"),
            resolution=resolution,
            global_batch=global_batch,
            seed=seed,
            rank=rank,
            world=world,
            prefetch=config.prefetch,
            cache_mb=config.cache_mb,
        )

    def batches(self, position: int = 0) -> Iterator[Batch]:
        """This rank's batches from a place in the stream on, without end.

        A batch is decoded by one thread, ``prefetch`` of them ahead of the consumer and no more.

        Args:
            position: samples that all ranks together have consumed before; any place is reached at once.

        Raises:
            UsageError: the position is negative.
            DataError: so many samples in a row are unreadable that the data set must be gone.
            StorageError: storage answers with errors; nothing is skipped for that, for other ranks may not see it.
        """
        if position < 0:
            raise UsageError("A position in the stream starts at 0.", value=position, rule="position >= 0")
        return self._stream(position)

    def _stream(self, position: int) -> Iterator[Batch]:
        pending: deque[Future[Batch]] = deque()
        try:
            while True:
                while len(pending) < self.prefetch:
                    pending.append(self._pool.submit(self._batch, position))
                    position += self.global_batch
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def _batch(self, position: int) -> Batch:
        rows = np.arange(position + self.rank, position + self.global_batch, self.world, dtype=np.int64)
        epochs, within = np.divmod(rows, len(self.split))
        ids = np.empty_like(rows)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            ids[chosen] = order(self.seed, int(epoch), within[chosen], len(self.split))
        found = [self._readable(int(index)) for index in ids]
        return _batch([decoded for _, decoded in found], [index for index, _ in found], epochs.tolist(), position)

    def _readable(self, wanted: int) -> tuple[int, Decoded]:
        """The sample, or the next readable one: every rank and every run takes the same, and no other row moves."""
        for step in range(min(_NEIGHBOURS, len(self.split))):
            index = (wanted + step) % len(self.split)
            if index in self.skipped:
                continue
            try:
                return index, self._decoded(index)
            except DataError as error:
                self._skip(index, error)
        raise DataError(
            f"{_NEIGHBOURS} samples in a row cannot be read; the data set is gone or damaged.",
            value=self.skipped.get(wanted),
            rule=f"a readable sample within {_NEIGHBOURS} of {self.split.name}[{wanted}]",
            mend="darkroom data show --verify compares every file with its checksum",
        )

    def _skip(self, index: int, error: DataError) -> None:
        with self._lock:
            first = index not in self.skipped
            self.skipped[index] = error.rule or error.message
        if first:
            _log.warning("Skipped %s[%d], for it cannot be read: %s", self.split.name, index, error.rule)

    def _decoded(self, index: int) -> Decoded:
        cached = self._cache.get(index)
        if cached is not None:
            return cached
        decoded = read(self.split, index, self.resolution)
        # whole epochs go by between two uses of a sample: evicting the oldest would evict what is needed next
        if len(self._cache) < self._cache_size:
            self._cache[index] = decoded
        return decoded

    def close(self) -> None:
        """Stop the threads; batches in work are finished and dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(split: Split, index: int, resolution: int) -> Decoded:
    """One sample as the network sees it.

    Returns:
        ``[resolution, resolution, 3]`` uint8 and the caption.

    Raises:
        DataError: it is damaged.
        StorageError: storage answers with errors.
    """
    picture, fields = split.picture(index)
    return square(picture, resolution), str(fields["caption"])


def _batch(rows: Sequence[Decoded], ids: Sequence[int], epochs: Sequence[int], position: int) -> Batch:
    pixels = torch.from_numpy(np.stack([image for image, _ in rows])).permute(0, 3, 1, 2).contiguous()
    return Batch(
        images=pixels.float().div_(127.5).sub_(1.0),
        captions=tuple(caption for _, caption in rows),
        sample_ids=tuple(ids),
        epochs=tuple(epochs),
        position=position,
    )


def _check(split: Split, resolution: int, global_batch: int, rank: int, world: int) -> None:
    if len(split) == 0:
        raise DataError(
            f"The {split.name} split is empty.",
            value=0,
            rule="at least one sample",
            mend="build the data set with another --held-out",
        )
    if world < 1 or not 0 <= rank < world:
        raise ConfigError("The rank is not in the world.", value=(rank, world), rule="0 <= rank < world")
    if global_batch < 1 or global_batch % world:
        nearest = sorted({max(world, global_batch // world * world), (global_batch // world + 1) * world})
        raise ConfigError(
            f"A global batch of {global_batch} cannot be shared equally by {world} workers.",
            value=global_batch,
            rule="global_batch is a positive multiple of the number of workers",
            options=nearest,
        )
    if resolution < 1:
        raise ConfigError("Pictures need a side.", value=resolution, rule="resolution >= 1")
