"""Which 64-bit hashes lie within a few bits of others, without comparing each with all.

Manku, Jain and Das Sarma (2007), "Detecting near-duplicates for web crawling", section 3: cut the hash into ``blocks``
pieces. Two hashes that differ in at most ``radius`` bits agree in at least ``blocks - radius`` whole pieces. One sorted
table for each choice of so many pieces therefore finds every such pair by equality, and a look-up costs
a binary search. More pieces give longer keys, so fewer chance candidates, and more tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

_BITS = 64
_MAX_TABLES = 40
_STRANGERS = 16
_MERGE = 4
"""Sorted runs are merged while the older is no more than so many times the younger: a table has few runs."""
_CANDIDATES = 1 << 22
"""Candidates that are looked at together; bounds memory where many hashes share a piece."""


def masks(radius: int, count: int) -> list[int]:
    """The bits of each table's key for ``count`` hashes: as many as leave few strangers with one key, in few tables."""
    best: list[int] = []
    for blocks in range(radius + 1, _BITS + 1):
        edges = [_BITS * piece // blocks for piece in range(blocks + 1)]
        pieces = [(1 << end) - (1 << start) for start, end in itertools.pairwise(edges)]
        choices = list(itertools.islice(itertools.combinations(pieces, blocks - radius), _MAX_TABLES + 1))
        if best and len(choices) > _MAX_TABLES:
            break
        best = [sum(choice) for choice in choices]
        if _STRANGERS << min(mask.bit_count() for mask in best) >= count:
            break
    return best


class HashIndex:
    """Hashes that can be found by others near them; grows by blocks. Takes 16 + 12 x tables bytes for each hash.

    Args:
        radius: bits that may differ.
        count: about how many hashes there will be.
    """

    def __init__(self, radius: int, count: int) -> None:
        self._radius = radius
        self._hashes = np.empty(max(1, count), np.uint64)
        self._ids = np.empty(max(1, count), np.int64)
        self._size = 0
        self._tables = [_Table(np.uint64(mask)) for mask in masks(radius, count)]

    def add(self, hashes: np.ndarray, ids: np.ndarray) -> None:
        """Add hashes, uint64, with their ids, int64."""
        end = self._size + len(hashes)
        if end > len(self._hashes):
            self._hashes = np.resize(self._hashes, 2 * end)
            self._ids = np.resize(self._ids, 2 * end)
        self._hashes[self._size : end], self._ids[self._size : end] = hashes, ids
        for table in self._tables:
            table.add(hashes, np.arange(self._size, end, dtype=np.uint32))
        self._size = end

    def near(self, hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs of (position in ``hashes``, id in the index) within the radius; a pair may come more than once."""
        for table in self._tables:
            for queries, slots in table.equal(hashes):
                close = np.bitwise_count(hashes[queries] ^ self._hashes[slots]) <= self._radius
                yield queries[close], self._ids[slots[close]]


class _Table:
    """Slots sorted by some bits of their hashes, as a few sorted runs."""

    def __init__(self, mask: np.uint64) -> None:
        self._mask = mask
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, hashes: np.ndarray, slots: np.ndarray) -> None:
        self._runs.append(_sorted(hashes & self._mask, slots))
        while len(self._runs) > 1 and len(self._runs[-2][0]) <= _MERGE * len(self._runs[-1][0]):
            (older, first), (younger, second) = self._runs[-2:]
            self._runs[-2:] = [_sorted(np.concatenate([older, younger]), np.concatenate([first, second]))]

    def equal(self, hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs of (position in ``hashes``, slot) whose masked bits are equal."""
        wanted = hashes & self._mask
        for keys, slots in self._runs:
            starts = np.searchsorted(keys, wanted, "left")
            counts = np.searchsorted(keys, wanted, "right") - starts
            sums = np.cumsum(counts)
            first = 0
            while first < len(hashes):
                before = sums[first - 1] if first else 0
                last = max(first + 1, int(np.searchsorted(sums, before + _CANDIDATES, "right")))
                part = counts[first:last]
                queries = np.repeat(np.arange(first, last), part)
                steps = np.arange(len(queries)) - np.repeat(np.cumsum(part) - part, part)
                yield queries, slots[np.repeat(starts[first:last], part) + steps]
                first = last


def _sorted(keys: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(keys, kind="stable")
    return keys[order], slots[order]
