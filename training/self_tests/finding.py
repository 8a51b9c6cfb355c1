"""What a self-test found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One measured fact, and what it may be.

    Attributes:
        name: of the check.
        ok: whether the figure is within its tolerance.
        detail: what was measured, in words.
        figure: the measured value; None where the check could not be made.
        tolerance: the most, or with ``at_least`` the least, that the figure may be.
        at_least: whether ``tolerance`` is a lower bound.
        mend: what to do; None when nothing needs doing.
    """

    name: str
    ok: bool
    detail: str
    figure: float | None = None
    tolerance: float | None = None
    at_least: bool = False
    mend: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def measured(name: str, figure: float, at_most: float, detail: str, mend: str) -> Finding:
    """A finding whose figure may be no larger; one that is not a number is never right."""
    ok = math.isfinite(figure) and figure <= at_most
    return Finding(name, ok, detail, figure, at_most, mend=None if ok else mend)


def reached(name: str, figure: float, at_least: float, detail: str, mend: str) -> Finding:
    """A finding whose figure may be no smaller."""
    ok = math.isfinite(figure) and figure >= at_least
    return Finding(name, ok, detail, figure, at_least, at_least=True, mend=None if ok else mend)


def failed(name: str, why: str, mend: str) -> Finding:
    """A check that could not be made."""
    return Finding(name, False, why, mend=mend)


def parse(told: Mapping[str, Any]) -> Finding:
    """A finding that came as JSON."""
    return Finding(**told)
