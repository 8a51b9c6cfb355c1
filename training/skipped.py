"""Damaged samples that the loader replaced, told by name and by number."""

from __future__ import annotations

from collections.abc import Mapping

from training.spec import Emit

MOST = 5
"""So many are named; of the others, the number is told."""


class SkippedSamples:
    """Tells once of every sample that one rank's loader has skipped.

    Args:
        skipped: the loader's own record, sample id to reason; it grows while the loader works.
        split: the split's name.
        rank: whose loader it is.
        emit: takes the warnings.
    """

    def __init__(self, skipped: Mapping[int, str], split: str, rank: int, emit: Emit) -> None:
        self._skipped, self._split, self._rank, self._emit = skipped, split, rank, emit
        self._told = 0

    def __len__(self) -> int:
        return len(self._skipped)

    def tell(self) -> None:
        """Name those that have come since the last call, as long as they are few."""
        # a copy, for the loader's threads write; in the order in which they were met
        for index, reason in list(self._skipped.items())[self._told : MOST]:
            self._warn(f"{self._split}[{index}] is skipped on rank {self._rank}, for it cannot be read: {reason}")
            self._told += 1

    def close(self) -> None:
        """Say how many there were in all."""
        self.tell()
        if self._skipped:
            self._warn(f"{len(self)} samples of {self._split} were skipped on rank {self._rank}.")

    def _warn(self, message: str) -> None:
        self._emit({"event": "warning", "message": message})
