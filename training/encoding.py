"""What a run needs and nobody has encoded yet is encoded by its ranks together, before the first step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

from training import ranks
from training.data.dataset import Dataset
from training.data.encode import Job, ensure
from training.data.manifest import SPLITS

ROUND_S = 5.0
"""After so long, and the shard then in work, ranks hear of one another, and that one is asked to leave: no collective
waits for longer than the process group allows."""
_TELL_S = 1.0


@dataclass(frozen=True)
class Watch:
    """Who waits for an encoding.

    Attributes:
        tell: told (samples that all ranks have done, in all) now and then; each rank calls its own.
        give_up: whether this process was asked to leave; looked at whenever some samples are done.
    """

    tell: Callable[[int, int], None]
    give_up: Callable[[], bool]


def together(dataset: Dataset, job: Job, watch: Watch, *, part: int, parts: int) -> bool:
    """Encode what is missing; every rank calls it.

    Args:
        dataset: what to encode.
        job: how.
        watch: who waits.
        part: this rank's number among those that share the work.
        parts: how many share it.

    Returns:
        False where a rank was asked to leave; whole files stay.

    Raises:
        ConfigError: the encoder cannot be loaded; on every rank alike.
        StorageError: storage answers with errors; on every rank alike.
    """
    share = _Share(dataset, job, watch, part, parts)
    while True:
        left = ranks.on_every_rank(share.for_a_while)
        any_left, leaving, done, made = ranks.total(left, watch.give_up(), share.done, share.made)
        if leaving:
            return False
        if not any_left:
            if made:
                watch.tell(share.total, share.total)
            return True
        share.others = done - share.done


class _LeavingError(Exception):
    """Ends an encoding in the middle of a shard."""


class _Share:
    """One rank's share.

    Attributes:
        total: samples of the data set.
        done: samples looked at or encoded here.
        made: shards encoded here.
        others: samples that the other ranks had done when they were heard of last.
    """

    def __init__(self, dataset: Dataset, job: Job, watch: Watch, part: int, parts: int) -> None:
        self.total = sum(split.count for split in dataset.manifest.splits.values())
        self.done = self.made = self.others = 0
        self._watch = watch
        self._told_s = time.monotonic()
        self._shards = chain.from_iterable(
            ensure(dataset, split, job, part=part, parts=parts, tick=self._tick) for split in SPLITS
        )

    def for_a_while(self) -> bool:
        """Encode for a round; whether there is something left."""
        end_s = time.monotonic() + ROUND_S
        try:
            for made in self._shards:
                self.made += made
                if time.monotonic() > end_s:
                    return True
        except _LeavingError:
            return True
        return False

    def _tick(self, samples: int) -> None:
        self.done += samples
        if self._watch.give_up():
            raise _LeavingError
        if time.monotonic() - self._told_s > _TELL_S:
            self._told_s = time.monotonic()
            self._watch.tell(min(self.done + self.others, self.total), self.total)
