"""Which words captions hold: a vocabulary in bounded memory, and how often its words meet each group."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

VOCABULARY = 2000
"""The commonest words, which are paired with groups."""
_TRACKED = 200_000
"""Words that are counted at once."""
_MAX_LETTERS = 40
_WAITING = 500_000
_WORD = re.compile(r"[^\W\d_][\w'’-]+")  # noqa: RUF001 - the curly apostrophe is what many captions have


def words_in(caption: str) -> frozenset[str]:
    """The words of a caption, in small letters, each once; numbers and single letters are none."""
    return frozenset(word[:_MAX_LETTERS].rstrip("'’-") for word in _WORD.findall(caption.casefold()))  # noqa: RUF001


class Vocabulary:
    """Finds the commonest words of any number of captions.

    Lossy counting (Manku & Motwani 2002): when too many words are tracked, the rarest go. A word's count may so fall
    short, but a common one is never lost.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._floor = 0

    def add(self, words: Iterable[str]) -> None:
        """The words of one caption."""
        self._counts.update(words)
        while len(self._counts) > _TRACKED:
            self._floor += 1
            self._counts = Counter({word: count for word, count in self._counts.items() if count > self._floor})

    def commonest(self) -> tuple[str, ...]:
        """At most ``VOCABULARY`` words, those in most captions first."""
        ranked = sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        return tuple(word for word, _ in ranked[:VOCABULARY])


class Meetings:
    """Counts in how many captions each word of a vocabulary meets each group of some fields.

    Args:
        words: the vocabulary.
        groups: of each field, the values in their order; None stands for the rare ones.
    """

    def __init__(self, words: Sequence[str], groups: Mapping[str, Sequence[str | None]]) -> None:
        self._words = {word: place for place, word in enumerate(words)}
        self._fields = {field: _Field(values, len(words)) for field, values in groups.items()}

    def add(self, values: Mapping[str, Sequence[str]], words: Iterable[str]) -> None:
        """One kept picture's caption, with the picture's values of each field; for a field without one it is none."""
        columns = [self._words[word] for word in words if word in self._words]
        for name, field in self._fields.items():
            field.add(values.get(name, ()), columns)

    def counts(self, name: str) -> Counted:
        """What was counted for one field."""
        field = self._fields[name]
        field.flush()
        return Counted(field.captions, field.with_word, field.in_group, field.together)


@dataclass(frozen=True)
class Counted:
    """Captions of one field: in all, with each word, of each group, and of each group with each word."""

    captions: int
    with_word: np.ndarray
    in_group: np.ndarray
    together: np.ndarray


class _Field:
    """Collects the places to count, and counts many at once: one by one numpy would be slow."""

    def __init__(self, values: Sequence[str | None], words: int) -> None:
        self.captions = 0
        self.with_word = np.zeros(words, np.int64)
        self.in_group = np.zeros(len(values), np.int64)
        self.together = np.zeros((len(values), words), np.int64)
        self._places = {value: place for place, value in enumerate(values)}
        self._columns: list[int] = []
        self._rows: list[int] = []
        self._cells: list[int] = []

    def add(self, values: Sequence[str], columns: list[int]) -> None:
        rows = {self._places.get(value, self._places.get(None)) for value in values} - {None}
        if not rows:
            return
        self.captions += 1
        self._columns += columns
        for row in rows:
            if row is not None:
                self._rows.append(row)
                start = row * len(self.with_word)
                self._cells += [start + column for column in columns]
        if len(self._cells) > _WAITING:
            self.flush()

    def flush(self) -> None:
        self.with_word += _counted(self._columns, self.with_word.size)
        self.in_group += _counted(self._rows, self.in_group.size)
        self.together += _counted(self._cells, self.together.size).reshape(self.together.shape)
        self._columns, self._rows, self._cells = [], [], []


def _counted(places: list[int], size: int) -> np.ndarray:
    return np.bincount(np.array(places, np.int64), minlength=size)
