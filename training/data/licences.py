"""Licences as stated beside the pictures, counted in bounded memory: strangers may state a new one for each."""

from __future__ import annotations

from collections import Counter

from training.data.captions import Fields
from training.data.entries import printable

UNSTATED = "unstated"
OTHER = "other"
SHOWN = 50
"""Licences that a manifest lists by name."""
_KNOWN = 10_000
"""Licences counted by name; those that come first are."""
_MAX_LETTERS = 200


def licence_of(fields: Fields) -> str:
    """The licence in a picture's fields, printable and cut; ``""`` where none is stated."""
    return printable(str(fields.get("licence") or fields.get("license") or "")[:_MAX_LETTERS])


class Licences:
    """Counts how many samples state which licence."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, licence: str) -> None:
        """One sample more."""
        name = licence or UNSTATED
        self._counts[name if name in self._counts or len(self._counts) < _KNOWN else OTHER] += 1

    def most(self) -> dict[str, int]:
        """The commonest ``SHOWN`` by name, the rest together as ``OTHER``; their sum is the number of samples."""
        ranked = sorted(self._counts.items(), key=lambda pair: (-pair[1], pair[0]))
        shown = Counter(dict(ranked[:SHOWN]))
        rest = sum(count for _, count in ranked[SHOWN:])
        shown.update({OTHER: rest} if rest else {})
        return dict(sorted(shown.items()))
