"""What a run must have consumed, step by step, and its digests; from the recipe and the index alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from training.data.schedule import Schedule
from training.data.use_digest import RowHash

BLOCK_ROWS = 1 << 18
"""Rows looked at together."""


class Plan:
    """The steps that a recipe prescribes, numbered from 1.

    Args:
        schedule: which samples each global batch holds.
        prefixes: the index's ``sha256_prefix`` of every sample.
        row_hash: of the data set.
    """

    def __init__(self, schedule: Schedule, prefixes: np.ndarray, row_hash: RowHash) -> None:
        self._schedule, self._prefixes, self._row_hash = schedule, prefixes, row_hash
        self.samples = len(prefixes)
        self.global_batch = schedule.global_batch

    def blocks(self, steps: int) -> Iterator[tuple[int, int]]:
        """Steps 1 to ``steps`` in pieces that fit in memory: each from its first to before its end."""
        size = max(1, BLOCK_ROWS // self.global_batch)
        for first in range(1, steps + 1, size):
            yield first, min(first + size, steps + 1)

    def rows(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample ids and epochs, int64 ``[steps, global_batch]``, of steps ``first`` to ``stop - 1``."""
        batches = [self._schedule.batch(step - 1) for step in range(first, stop)]
        return np.stack([batch.ids for batch in batches]), np.stack([batch.epochs for batch in batches])

    def hashes(self, epochs: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """The rows' hashes, uint64 ``[*shape, 2]``."""
        return self._row_hash.rows(epochs, ids, self._prefixes[ids])

    def digests(self, epochs: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """The steps' digests, uint64 ``[steps, 2]``, of what ``rows`` gave."""
        digests: np.ndarray = self.hashes(epochs, ids).sum(axis=1, dtype=np.uint64)
        return digests
