"""A ledger of use, read: which records count, which were done again, and what is wrong with the file itself."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.data.use_ledger import DTYPE, LEFT_OUT, MISSING, RESUMED, STEP, after, read

_BLOCK = 1 << 16
"""Records looked at together."""


@dataclass(frozen=True)
class Flaw:
    """Something about the file that no run of ours writes.

    Attributes:
        kind: ``damaged``, ``missing``, ``repeated`` or ``altered``.
        first: the first step that it concerns.
        last: the last one.
    """

    kind: str
    first: int
    last: int


class UseRecords:
    """The records of a ledger.

    Args:
        path: ``RUN/use/steps.bin``.
        at_least: steps that the run is known to have done.

    Attributes:
        steps: the last step; they are numbered from 1.
        redone: records of steps that were done again later.
        flaws: what is wrong with the file.

    Raises:
        DataError: there is no ledger.
    """

    def __init__(self, path: Path, at_least: int = 0) -> None:
        self._records = read(path)
        self.flaws: list[Flaw] = []
        self._sound = sound = np.concatenate([_sound(part) for part in _parts(self._records)] or [np.zeros(0, bool)])
        kinds = self._records["kind"]
        for place in np.flatnonzero(~sound).tolist():
            number = int(self._records[place]["step"]) if kinds[place] in (STEP, MISSING, LEFT_OUT) else 0
            self.flaws.append(Flaw("damaged", number, number))
        self._void, places = _effective(self._records, np.flatnonzero(sound & np.isin(kinds, (STEP, RESUMED))))
        numbers = self._records["step"][places].astype(np.int64)
        unique, firsts = np.unique(numbers, return_index=True)
        self.steps = max([at_least, *unique[-1:].tolist()])
        self._place_of = np.full(self.steps, -1, dtype=np.int64)
        self._place_of[unique - 1] = places[firsts]
        twice = np.setdiff1d(np.arange(len(numbers)), firsts)
        self.flaws += [Flaw("repeated", step, step) for step in sorted(numbers[twice].tolist())]
        self.flaws += [Flaw("missing", first, last) for first, last in _ranges(np.flatnonzero(self._place_of < 0) + 1)]
        self.flaws += [Flaw("altered", step, step) for step in self._broken_links()]
        self.redone = len(self._void)

    def of(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The records of steps ``first`` to ``stop - 1``, and which of them there are."""
        places = self._place_of[first - 1 : stop - 1]
        there = places >= 0
        found = np.zeros(len(places), DTYPE)
        found[there] = self._records[places[there]]
        return found, there

    def missing(self, step: int) -> np.ndarray:
        """The samples that a step could not read: int64 ``[n, 2]``, id and epoch."""
        place = int(self._place_of[step - 1])
        count = int(self._records[place]["missing"])
        before = self._records[max(0, place - count) : place]
        named = before[(before["kind"] == MISSING) & (before["step"] == step)]
        missing: np.ndarray = named["digest"].astype(np.int64)
        return missing

    def left_out(self) -> list[tuple[int, int]]:
        """The first and the last of steps whose updates were undone, in order."""
        places = np.flatnonzero(self._sound & (self._records["kind"] == LEFT_OUT))
        counts = np.append(self._place_of, -1)
        found = []
        for place in places.tolist():
            step = int(self._records[place]["step"])
            here = counts[step - 1] if step <= self.steps else -1
            # of a step that was done again later, the last record counts
            if 0 <= here - place <= 1 + int(self._records[here]["missing"]):
                found.append(tuple(self._records[place]["digest"].tolist()))
        return found

    def running(self, step: int) -> str | None:
        """The running digest after a step, None where there is no record of it."""
        if step == 0:
            return "0" * 32
        if step > self.steps or self._place_of[step - 1] < 0:
            return None
        digest: str = self._records[self._place_of[step - 1]]["running"].tobytes().hex()
        return digest

    def done_otherwise(self) -> Iterator[int]:
        """Steps that consumed something else when they were done again."""
        for place in self._void.tolist():
            step = int(self._records[place]["step"])
            now = self._place_of[step - 1] if step <= self.steps else -1
            if now >= 0 and not _alike(self._records[place], self._records[now]):
                yield step

    def _broken_links(self) -> Iterator[int]:
        """Steps whose running digest does not follow from that of the step before; gaps are told elsewhere."""
        before: bytes | None = bytes(16)
        for first in range(1, self.steps + 1, _BLOCK):
            records, there = self.of(first, min(first + _BLOCK, self.steps + 1))
            for number, (record, known) in enumerate(zip(records, there.tolist(), strict=True)):
                running = record["running"].tobytes() if known else None
                if running is not None and before is not None and after(before, record) != running:
                    yield first + number
                before = running


def _alike(one: np.void, other: np.void) -> bool:
    """Whether two records of a step say the same, apart from what was unreadable at the time."""
    return one["missing"] != other["missing"] or bool((one["digest"] == other["digest"]).all())


def _effective(records: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the places of steps' and resumptions' records: steps that were done again, and steps that count."""
    numbers = records["step"][places].astype(np.int64)
    is_step = records["kind"][places] == STEP
    # each resumption voids what lies before it and is of a later step
    never = np.iinfo(np.int64).max
    bounds = np.append(np.where(is_step, never, numbers)[1:], never)
    counts = is_step & (numbers <= np.minimum.accumulate(bounds[::-1])[::-1])
    return places[is_step & ~counts], places[counts]


def _sound(records: np.ndarray) -> np.ndarray:
    """Which records have the checksum that they should have."""
    size, end = DTYPE.itemsize, DTYPE.itemsize - DTYPE["check"].itemsize
    data = records.tobytes()
    found = [zlib.crc32(data[start : start + end]) for start in range(0, len(data), size)]
    sound: np.ndarray = np.array(found, dtype=np.uint32) == records["check"]
    return sound


def _parts(records: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(records), _BLOCK):
        yield records[start : start + _BLOCK]


def _ranges(numbers: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of consecutive numbers, as first and last."""
    if len(numbers):
        breaks = np.flatnonzero(np.diff(numbers) > 1)
        firsts, lasts = numbers[np.r_[0, breaks + 1]], numbers[np.r_[breaks, len(numbers) - 1]]
        yield from zip(firsts.tolist(), lasts.tolist(), strict=True)
