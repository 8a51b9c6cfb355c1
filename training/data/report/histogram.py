"""Histograms in one pass and bounded memory: values are counted on a fine grid, and the bins are chosen at the end."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

_MIN_BINS = 9
_MAX_BINS = 40
_FINE = 32
"""Grid steps per doubling on a logarithmic axis: 2.2 %."""
_STEPS = (1.0, 2.0, 5.0)
_MAX_CELLS = 1_000_000
"""Grid cells on either side of zero; values beyond count as the last."""


@dataclass(frozen=True)
class Quantity:
    """Something that every picture has.

    Attributes:
        name: for scripts.
        title: for people.
        unit: of the axis.
        scale: ``log`` counts by ratios and takes positive values only; ``linear`` by differences.
        grid: the step of the fine grid on a linear axis, 1 for whole numbers.
        exact: whole numbers of a bounded range, counted as they are on a logarithmic axis too.
        rule: the cleaning rule that cuts by it.
        help: how to read it, in one sentence.
    """

    name: str
    title: str
    unit: str
    scale: Literal["log", "linear"]
    grid: float = 1.0
    rule: str = ""
    help: str = ""
    exact: bool = False


@dataclass(frozen=True)
class Bin:
    """Pictures with a value in ``[low, high)``."""

    low: float
    high: float
    kept: int
    dropped: int


@dataclass(frozen=True)
class Histogram:
    """How a quantity is distributed.

    Attributes:
        quantity: what is counted.
        bins: side by side, without gaps; empty where nothing is known.
        low: the 5th percentile of what was kept, to the grid's step.
        median: of what was kept.
        high: the 95th percentile.
        unknown: inputs of which it is not known, those never read among them.
        threshold: where the rule cut, if it dropped anything.
    """

    quantity: Quantity
    bins: tuple[Bin, ...]
    low: float | None
    median: float | None
    high: float | None
    unknown: int
    threshold: float | None


class Counts:
    """Counts one quantity of kept and dropped inputs."""

    def __init__(self, quantity: Quantity) -> None:
        self.quantity = quantity
        self._kept: Counter[int] = Counter()
        self._dropped: Counter[int] = Counter()
        self._unknown = 0

    def add(self, values: np.ndarray, kept: np.ndarray) -> None:
        """Count inputs.

        Args:
            values: float64 ``[n]``; what is not finite, or not positive on a logarithmic axis, is unknown.
            kept: bool ``[n]``.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            places = np.log2(values) * _FINE if self.quantity.scale == "log" else values / self.quantity.grid
        known = np.isfinite(places)
        if self.quantity.exact:
            places = values
        self._unknown += int((~known).sum())
        cells = np.clip(np.round(places[known]), -_MAX_CELLS, _MAX_CELLS).astype(np.int64)
        for counter, chosen in ((self._kept, kept[known]), (self._dropped, ~kept[known])):
            unique, counts = np.unique(cells[chosen], return_counts=True)
            counter.update(dict(zip(unique.tolist(), counts.tolist(), strict=True)))

    def histogram(self, threshold: float | None) -> Histogram:
        """What was counted, in at most 40 bins."""
        cells = sorted(self._kept.keys() | self._dropped.keys())
        low, median, high = (self._percentile(share) for share in (0.05, 0.5, 0.95))
        bins = self._bins(self._place(cells[0]), self._place(cells[-1])) if cells else ()
        return Histogram(self.quantity, bins, low, median, high, self._unknown, threshold)

    def _place(self, cell: int) -> int:
        """A counted cell's place on the fine grid."""
        return round(math.log2(cell) * _FINE) if self.quantity.exact else cell

    def _value(self, place: float) -> float:
        value = 2.0 ** (place / _FINE) if self.quantity.scale == "log" else place * self.quantity.grid
        return float(f"{value:.6g}")

    def _percentile(self, share: float) -> float | None:
        left = share * self._kept.total()
        for cell in sorted(self._kept):
            left -= self._kept[cell]
            if left <= 0:
                return float(cell) if self.quantity.exact else self._value(cell)
        return None

    def _bins(self, first: int, last: int) -> tuple[Bin, ...]:
        """Bins whose middles (log: whole fractions of a doubling) or lower edges (linear) are round numbers."""
        step, shift = _steps(first, last, self.quantity.scale)
        kept, dropped = (self._into(counter, step, shift) for counter in (self._kept, self._dropped))
        numbers = _at_least(math.floor((first + shift) / step), math.floor((last + shift) / step), self.quantity.scale)
        edges = [number * step - shift - (0.5 if self.quantity.scale == "log" else 0) for number in numbers]
        return tuple(
            Bin(self._value(edge), self._value(edge + step), kept[number], dropped[number])
            for number, edge in zip(numbers, edges, strict=True)
        )

    def _into(self, counter: Counter[int], step: int, shift: int) -> Counter[int]:
        wide: Counter[int] = Counter()
        for cell, count in counter.items():
            wide[math.floor((self._place(cell) + shift) / step)] += count
        return wide


def _at_least(first: int, last: int, scale: Literal["log", "linear"]) -> range:
    """The bins, with empty ones around a few: alone on an axis they would show no scale."""
    missing = max(0, _MIN_BINS - (last - first + 1))
    before = missing // 2 if scale == "log" or first < 0 else min(missing // 2, first)
    return range(first - before, last + missing - before + 1)


def _steps(first: int, last: int, scale: Literal["log", "linear"]) -> tuple[int, int]:
    """The cells of a bin, and by how much bins start before a multiple of it."""
    if scale == "log":
        step = next(step for step in (4, 8, 16, 32, 64, 128, 2 * _MAX_CELLS) if (last - first) / step < _MAX_BINS - 2)
        return step, step // 2
    factor = 0
    while True:
        for nice in _STEPS:
            step = int(nice * 10**factor)
            if (last - first) / step < _MAX_BINS - 2:
                return step, 0
        factor += 1
