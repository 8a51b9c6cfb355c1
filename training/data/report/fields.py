"""Which values a picture has of its metadata fields, and which fields are worth an audit; bounded whatever comes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from training.data.captions import CAPTION_FIELDS
from training.data.entries import printable

COLUMNS = ("licence", "creator", "domain", "kind")
"""Columns of the ledger that are fields too; they count where a picture's own fields have none of that name."""
MOST_VALUES = 50
"""Values that a field may have to be chosen unasked, and groups that an audit names."""
MIN_PER_VALUE = 5
"""Inputs per value, on average, that a field needs to be chosen unasked: ids and names have about one."""
MOST_FIELDS = 8
"""Fields chosen unasked."""
_MAX_NAMES = 500
"""Different fields that are looked at; strangers may invent one for each picture."""
_MAX_ASKED = 100_000
"""Values that are counted for a field that was asked for; what comes later counts as ``other``."""
_MAX_LETTERS = 80
_NOTHING: tuple[object, ...] = (None, "", [], {})
_FREE_TEXT = frozenset((*CAPTION_FIELDS, "url"))

Counted = dict[str | None, tuple[int, int]]
"""Inputs and kept by value; None gathers what is not counted by name."""


def values_of(fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The values of one field, printable and cut, each once; none where it is missing, empty or an object."""
    value = fields.get(name)
    if isinstance(value, list):
        return tuple(dict.fromkeys(text for text in map(_text, value) if text))
    text = _text(value)
    return (text,) if text else ()


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float | str):
        return printable(str(value).strip()[:_MAX_LETTERS])
    return ""


class Candidates:
    """Counts the values of all fields, and forgets those of a field that turns out to have too many.

    Args:
        asked: fields to count to the end; if there are any, no others are chosen.
    """

    def __init__(self, asked: Sequence[str]) -> None:
        self.asked = tuple(dict.fromkeys(asked))
        self.inputs = 0
        self.names: Counter[str] = Counter()
        self.several: set[str] = set()
        self._counts: dict[str, tuple[Counter[str | None], Counter[str | None]]] = {}
        self._with: dict[str, list[int]] = {}
        self._kept = 0

    def add(self, fields: Mapping[str, Any], *, kept: bool) -> None:
        """Count one input whose fields could be read."""
        self.inputs += 1
        self._kept += kept
        for name, value in fields.items():
            if value not in _NOTHING and (name in self.names or len(self.names) < _MAX_NAMES):
                self.names[name] += 1
        for name in self.asked or (name for name in fields if self._open(name)):
            values = values_of(fields, name)
            if not values:
                continue
            if len(values) > 1:
                self.several.add(name)
            if name not in self._with:
                self._with[name] = [0, 0]
            known = self._with[name]
            known[0] += 1
            known[1] += kept
            self._count(name, values, kept=kept)

    def _open(self, name: str) -> bool:
        """Whether a field may still be chosen: not free text, and not known to have too many values."""
        return name in self.names and name not in _FREE_TEXT and (name not in self._with or name in self._counts)

    def _count(self, name: str, values: Iterable[str], *, kept: bool) -> None:
        if name not in self._counts:
            self._counts[name] = Counter(), Counter()
        every, those_kept = self._counts[name]
        for value in values:
            full = len(every) >= _MAX_ASKED and value not in every
            every[None if full else value] += 1
            if kept:
                those_kept[None if full else value] += 1
        if not self.asked and len(every) > MOST_VALUES:
            del self._counts[name]

    def chosen(self) -> tuple[str, ...]:
        """The fields to audit: those asked for, or the fullest of those with few values."""
        if self.asked:
            return tuple(name for name in self.asked if name in self._counts)
        fit = [name for name, (every, _) in self._counts.items() if self._fits(name, every)]
        return tuple(sorted(fit, key=lambda name: (-self._with[name][0], name))[:MOST_FIELDS])

    def _fits(self, name: str, every: Counter[str | None]) -> bool:
        inputs = self._with[name][0]
        return (
            name not in self.several
            and 2 <= len(every) <= MOST_VALUES
            and inputs >= MIN_PER_VALUE * len(every)
            and 2 * inputs >= self.inputs
        )

    def counts(self, name: str) -> Counted:
        """A field's commonest values by name, the rest together."""
        every, kept = self._counts[name]
        ranked = sorted((value for value in every if value is not None), key=lambda value: (-every[value], value))
        found: Counted = {value: (every[value], kept[value]) for value in ranked[:MOST_VALUES]}
        rest = [*ranked[MOST_VALUES:], *([None] if None in every else [])]
        if rest:
            found[None] = sum(every[value] for value in rest), sum(kept[value] for value in rest)
        return found

    def without(self, name: str) -> tuple[int, int]:
        """Inputs whose fields could be read but lack this one, and how many of them are kept."""
        known, kept = self._with[name]
        return self.inputs - known, self._kept - kept
