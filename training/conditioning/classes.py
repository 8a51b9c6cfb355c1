"""A prompt is the name of a class."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from functools import cached_property

import torch

from training.conditioning.shape import ConditioningShape
from training.conditioning.told import Conditioning
from training.errors import UsageError

_OPTIONS = 12
"""Classes that a message names."""


class ClassEncoder:
    """Names of classes to their numbers; the empty name is the unconditional class.

    Args:
        names: of the classes, different ones, by number.

    Attributes:
        shape: of its rows.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.shape = ConditioningShape("class", classes=len(self.names))
        self._numbers = {name: number for number, name in enumerate(self.names)}

    @cached_property
    def hash(self) -> str:
        """Equal hashes give equal numbers."""
        return hashlib.sha256("\x00".join(self.names).encode()).hexdigest()

    def check(self, prompt: str) -> None:
        """Refuse what is no class's name.

        Raises:
            UsageError: with the names that are nearest.
        """
        name = _tidy(prompt)
        if name and name not in self._numbers:
            near = difflib.get_close_matches(name, self.names, n=_OPTIONS, cutoff=0.5)
            shown = near or list(self.names[:_OPTIONS])
            raise UsageError(
                "This model knows no such class.",
                value=prompt if len(prompt) <= 80 else prompt[:77] + "...",
                rule=f"one of its {len(self.names)} classes' names, or nothing",
                options=shown if len(shown) == len(self.names) else [*shown, "..."],
            )

    def encode(self, captions: Sequence[str]) -> Conditioning:
        """A row per name; a name that is not known is the unconditional class, as in ``number``."""
        numbers = torch.tensor([self.number(caption) for caption in captions], dtype=torch.float32)
        return Conditioning(numbers.reshape(-1, 1, 1), torch.ones(len(captions), 1, dtype=torch.bool))

    def number(self, name: str) -> int:
        """Of a class; the unconditional one's, which is their count, for any other name."""
        return self._numbers.get(_tidy(name), len(self.names))


def _tidy(name: str) -> str:
    """As captions are stored: one line without space around it."""
    return " ".join(name.split())
