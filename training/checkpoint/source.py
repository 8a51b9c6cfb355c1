"""A state put together from the parts that one or many ranks have left."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from training.checkpoint.layout import Entry
from training.errors import CheckpointError

if TYPE_CHECKING:
    import torch

Fetch = Callable[[Entry, int, int], "torch.Tensor"]
"""Gives elements of an entry: the first and the one after the last, counted within the entry."""


class PartsSource:
    """A ``StateSource`` over parts, which may have been cut anywhere.

    Args:
        scalars: see ``StateSource``.
        parts: every entry, and what reads its elements.
        shapes: of the whole tensors by group and name, where ``parts`` are not those of all ranks.
    """

    def __init__(
        self,
        scalars: Mapping[str, float],
        parts: Iterable[tuple[Entry, Fetch]],
        shapes: Mapping[str, Mapping[str, tuple[int, ...]]] | None = None,
    ) -> None:
        self.scalars = dict(scalars)
        self._held: dict[str, dict[str, list[tuple[Entry, Fetch]]]] = {}
        for entry, fetch in parts:
            self._held.setdefault(entry.group, {}).setdefault(entry.name, []).append((entry, fetch))
        for names in self._held.values():
            for held in names.values():
                held.sort(key=lambda one: one[0].start)
        mine = {group: {name: held[0][0].shape for name, held in names.items()} for group, names in self._held.items()}
        self._shapes = mine if shapes is None else shapes

    def groups(self) -> list[str]:
        """All groups."""
        return sorted(self._shapes)

    def shapes(self, group: str) -> Mapping[str, tuple[int, ...]]:
        """See ``StateSource``."""
        return self._shapes.get(group, {})

    def read(self, group: str, name: str, start: int, stop: int) -> torch.Tensor:
        """See ``StateSource``.

        Raises:
            CheckpointError: the parts do not hold all of that range.
        """
        import torch

        pieces: list[torch.Tensor] = []
        place = start
        for entry, fetch in self._held.get(group, {}).get(name, ()):
            if place >= stop:
                break
            if entry.start <= place < entry.start + entry.count:
                last = min(stop, entry.start + entry.count)
                pieces.append(fetch(entry, place - entry.start, last - entry.start))
                place = last
        held = self._held.get(group, {}).get(name)
        if place < stop or name not in self.shapes(group):
            raise CheckpointError(
                "The kept state does not hold what is asked of it.",
                value=f"{group} of {name}, elements {start} to {stop}",
                rule=f"whole up to element {place}",
            )
        if not pieces:
            return torch.empty(0, dtype=held[0][0].dtype if held else None)
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def whole(self, group: str) -> dict[str, torch.Tensor]:
        """Whole tensors by name."""
        return {
            name: self.read(group, name, 0, math.prod(shape)).reshape(shape)
            for name, shape in self.shapes(group).items()
        }
