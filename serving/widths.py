"""How many rows a call of the network takes, by size: fixed, so that no picture depends on its neighbours.

A kernel is chosen, and its sums are ordered, by the shape of its batch: at another width a row's last bits differ, at
one width they are the same whoever shares the call. So each size has one width. It is the config's, or it is measured
once and then kept: calls of several widths are timed, and the narrowest is taken that is nearly as fast, a row, as the
fastest.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from serving.bucket import Bucket
from serving.config import BatchConfig
from serving.scheduling import Call
from serving.width_store import WidthStore

log = logging.getLogger(__name__)

_REPEATS = 3
_FRESH = 0.1
"""Weight of the newest call in the running mean of what calls cost."""


class Size(NamedTuple):
    """Of pictures, in pixels."""

    height: int
    width: int


def candidates(most: int) -> list[int]:
    """Widths that are worth a try: powers of two up to ``most``."""
    return [1 << power for power in range(most.bit_length())]


def measured(
    call: Callable[[int], None], widths: Iterable[int], clock: Callable[[], float] = time.perf_counter
) -> dict[int, float]:
    """Seconds that a call of each width takes: the median of several, after one that warms up.

    It ends at the first width that gains nothing, or that the device has no memory for: a big network takes long.

    Args:
        call: makes one call of so many rows and waits for its end.
        widths: which to time, rising.
        clock: seconds.

    Raises:
        RuntimeError: not even the first width can be called.
    """
    table: dict[int, float] = {}
    for width in widths:
        try:
            taken = [_timed(call, width, clock) for _ in range(1 + _REPEATS)][1:]
        except RuntimeError as error:  # torch's, also where memory is short
            if not table:
                raise
            log.info("a call of %d rows is too wide: %s", width, error)
            break
        table[width] = statistics.median(taken)
        if len(table) > 1 and table[width] / width >= min(seconds / rows for rows, seconds in list(table.items())[:-1]):
            break
    return table


def _timed(call: Callable[[int], None], width: int, clock: Callable[[], float]) -> float:
    started = clock()
    call(width)
    return clock() - started


def best_width(seconds: Mapping[int, float], tolerance: float) -> int:
    """The narrowest width whose rows cost at most ``tolerance`` more than those of the best.

    A narrow call wastes less where few rows are here, and ends sooner.

    Args:
        seconds: of a call, by its width.
        tolerance: share of the best width's seconds per row.
    """
    per_row = {width: taken / width for width, taken in seconds.items()}
    limit = min(per_row.values()) * (1 + tolerance)
    return min(width for width, each in per_row.items() if each <= limit)


class Widths:
    """The width of each size's calls, and what they cost.

    Args:
        config: the width, or how it is measured.
        store: where measured widths are kept, for every process that serves these weights on such a device.
    """

    def __init__(self, config: BatchConfig, store: WidthStore | None = None) -> None:
        self._config = config
        self._store = store
        self._calls: dict[Size, Call] = {}

    def settle(self, size: Size, call: Callable[[int], None]) -> None:
        """Fix the width of a size: the config's, the kept one, or the best by measurement.

        Args:
            size: of the pictures.
            call: makes one call of so many rows.
        """
        if size in self._calls:
            return
        width = self._config.padded_rows or (self._store and self._store.width(size))
        if not width:
            best = best_width(measured(call, candidates(self._config.max_batch_rows)), self._config.width_tolerance)
            width = best if self._store is None else self._store.keep(size, best)
        self._calls[size] = Call(width, measured(call, [width])[width])

    def settled(self, size: Size) -> bool:
        """Whether its width is fixed."""
        return size in self._calls

    def call_of(self, bucket: Bucket) -> Call:
        """A call of a bucket whose size is settled."""
        return self._calls[Size(bucket.height, bucket.width)]

    def took(self, bucket: Bucket, calls: int, seconds: float) -> None:
        """Keep a running mean of what a call costs."""
        size = Size(bucket.height, bucket.width)
        known = self._calls[size]
        self._calls[size] = Call(known.rows, (1 - _FRESH) * known.seconds + _FRESH * seconds / calls)
