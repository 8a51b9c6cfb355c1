"""What each global batch holds, computed from its number alone; nothing is decoded and nothing remembered.

With one bucket, batch ``k`` holds the places ``k B`` to ``(k + 1) B`` of the endless stream of epochs. With several,
each bucket ``b`` of ``n_b`` samples has an endless stream of its own, cut into batches of ``B``. Up to the end of
epoch ``e`` it has given ``floor((e + 1) n_b / B)`` of them; what is left over goes into its first batch of the next
epoch. So every sample is read exactly once in each epoch of its bucket, and every batch is full.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training import noise
from training.data.buckets import Bucket, Members, buckets_of
from training.data.dataset import Dataset
from training.data.loader_config import LoaderConfig
from training.data.manifest import SplitName
from training.data.order import order
from training.errors import DataError, UsageError

_PHASE_BITS = 32
_TOGETHER = 4096
"""Rows of a rank whose samples are computed at once, within an epoch: batch by batch costs many times as much."""


@dataclass(frozen=True)
class GlobalBatch:
    """What the ranks read in one optimizer step: all of it, or one rank's share.

    Attributes:
        number: from 0.
        position: samples that all ranks have consumed before this batch.
        ids: int64, the sample of each row; rank ``r`` of ``w`` has the rows ``r::w`` of the whole.
        epochs: int64, how often each row's sample was read before.
        bucket: of the shape, its number among the schedule's buckets.
        shape: of the pictures.
    """

    number: int
    position: int
    ids: np.ndarray
    epochs: np.ndarray
    bucket: int
    shape: Bucket


class Schedule:
    """The endless sequence of global batches; not for several threads at a time.

    Args:
        members: which samples each bucket holds.
        global_batch: rows of all ranks together.
        seed: names the order.
        block: consecutive samples that are read at about the same time.
        window: blocks that are mixed.

    Raises:
        DataError: there are no samples.
    """

    def __init__(self, members: Members, *, global_batch: int, seed: int, block: int, window: int) -> None:
        if sum(members.counts) == 0:
            raise DataError(
                "The split is empty.",
                value=0,
                rule="at least one sample",
                mend="build the data set with another --held-out",
            )
        self.members, self.global_batch, self.seed = members, global_batch, seed
        self._block, self._window = block, window
        self._counts = np.array(members.counts, dtype=np.int64)
        self._recent: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def open(
        cls,
        dataset: Dataset,
        config: LoaderConfig,
        *,
        resolution: int,
        global_batch: int,
        seed: int,
        split: SplitName = "train",
    ) -> Schedule:
        """The schedule of a data set under a recipe.

        Raises:
            DataError: the split is empty, or its index cannot be read.
            StorageError: the lists of the buckets cannot be written.
        """
        members = Members.open(
            dataset.split(split).records,
            buckets_of(resolution, config.buckets),
            fewest=global_batch,
            data_hash=f"{dataset.hash}/{split}",
            cache=Path(config.disk_cache.folder).expanduser() if config.disk_cache.folder else None,
        )
        return cls(members, global_batch=global_batch, seed=seed, block=config.block, window=config.window)

    def batch(self, number: int, rank: int = 0, world: int = 1) -> GlobalBatch:
        """What global batch ``number``, from 0, holds; with ``rank`` and ``world``, that rank's rows alone.

        Raises:
            UsageError: the number is negative.
        """
        if number < 0:
            raise UsageError("Batches are counted from 0.", value=number, rule="number >= 0")
        bucket, place = self._place(number)
        together = max(1, min(_TOGETHER * world, int(self._counts[bucket])) // self.global_batch)
        first, within = divmod(place, together)
        key = (bucket, first, together, rank, world)
        if key not in self._recent:
            while len(self._recent) > 2 * len(self._counts):
                self._recent.pop(next(iter(self._recent)))
            starts = np.arange(together, dtype=np.int64) * self.global_batch
            rows = (starts[:, None] + np.arange(rank, self.global_batch, world, dtype=np.int64)).ravel()
            self._recent[key] = self._rows(bucket, first * together * self.global_batch, rows)
        ids, epochs = self._recent[key]
        share = share_of(self.global_batch, rank, world)
        part = slice(within * share, (within + 1) * share)
        return GlobalBatch(
            number, number * self.global_batch, ids[part], epochs[part], bucket, self.members.buckets[bucket]
        )

    def _rows(self, bucket: int, start: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids and epochs at places of a bucket's stream, ``rows`` after ``start``."""
        count = int(self._counts[bucket])
        first_epoch, first = divmod(start, count)  # Python's numbers, for they have no largest
        steps, within = np.divmod(rows + first, count)
        places = np.empty_like(within)
        for step in np.unique(steps):
            chosen = steps == step
            places[chosen] = order(
                self.seed,
                first_epoch + int(step),
                within[chosen],
                count,
                block=self._block,
                window=self._window,
                stream=bucket,
            )
        return self.members.ids(bucket, places), first_epoch + steps

    def _place(self, number: int) -> tuple[int, int]:
        """The bucket of a batch, and its number in the bucket's own stream."""
        if len(self._counts) == 1:
            return 0, number
        epoch = self._epoch(number)
        before, after = self._given(epoch), self._given(epoch + 1)
        bucket, place = _interleaved(number - sum(before), np.subtract(after, before), self._phases(epoch))
        return bucket, before[bucket] + place

    def _given(self, epoch: int) -> list[int]:
        """Batches of each bucket in all epochs before this one."""
        return [epoch * count // self.global_batch for count in self.members.counts]

    def _epoch(self, number: int) -> int:
        """The epoch that a batch lies in."""
        low, high = 0, 1 + (number + len(self._counts) + 1) * self.global_batch // int(self._counts.sum())
        while high - low > 1:  # the first batch of epoch `low` is not behind `number`, that of `high` is
            middle = (low + high) // 2
            low, high = (middle, high) if sum(self._given(middle)) <= number else (low, middle)
        return low

    def _phases(self, epoch: int) -> np.ndarray:
        drawn = noise.generator(self.seed, epoch, "buckets")
        return drawn.integers(0, 1 << _PHASE_BITS, size=len(self._counts), dtype=np.int64)


def share_of(global_batch: int, rank: int, world: int) -> int:
    """Rows of a rank in each global batch; the first ranks have one more where the batch cannot be shared equally."""
    return len(range(rank, global_batch, world))


def _interleaved(slot: int, counts: np.ndarray, phases: np.ndarray) -> tuple[int, int]:
    """The bucket at a slot of an epoch, and how many of its batches come before.

    Each bucket's ``c`` batches lie evenly spread over the epoch, the first one at a phase drawn for it: batch ``j`` at
    ``(j + phase) / c``. Sorted by that, a bucket's batches keep their order, so that its reads stay local; the place of
    any slot is found by bisection.
    """

    def before(time: int) -> np.ndarray:
        """Batches of each bucket that lie before ``time``, a fraction of the epoch in units of 2^-32."""
        numbers: np.ndarray = np.clip(-((phases - time * counts) >> _PHASE_BITS), 0, counts)
        return numbers

    low, high = 0, 1 << _PHASE_BITS
    while high - low > 1:  # `slot` is not before low, and before high
        middle = (low + high) // 2
        low, high = (low, middle) if before(middle).sum() > slot else (middle, high)
    started, there = before(low), before(high) - before(low)
    # of batches that lie at the very same time, the lower bucket's comes first
    bucket = int(np.searchsorted(np.cumsum(there), slot - int(started.sum()), side="right"))
    return bucket, int(started[bucket] + (slot - int(started.sum()) - int(np.cumsum(there)[bucket] - there[bucket])))
