"""A host copy of one rank's state at a step, whole."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from training.checkpoint.layout import Layout

if TYPE_CHECKING:
    import torch

    from training.checkpoint.layout import Entry
    from training.checkpoint.source import Fetch
    from training.engine_state import Part


class Slab:
    """Memory with room for a layout.

    Args:
        layout: what it holds.
        buffer: writable, of ``layout.size`` bytes at least, from its beginning; None takes memory of the process.
    """

    def __init__(self, layout: Layout, buffer: Any = None) -> None:
        self.layout = layout
        self.buffer = memoryview(mmap.mmap(-1, max(1, layout.size)) if buffer is None else buffer)
        self.views = layout.views(self.buffer)
        self.scalars: Mapping[str, float] = {}

    def fill(self, values: Sequence[torch.Tensor], scalars: Mapping[str, float]) -> None:
        """Copy the values, one per entry; afterwards the originals may change."""
        import torch

        with torch.no_grad():
            torch._foreach_copy_(self.views, list(values), non_blocking=True)
            if any(value.is_cuda for value in values[:1]):
                torch.cuda.current_stream().synchronize()
        self.scalars = dict(scalars)

    def parts(self) -> list[tuple[Entry, Fetch]]:
        """For a ``PartsSource``; what is read of it is a copy."""
        views = dict(zip(map(id, self.layout.entries), self.views, strict=True))
        return [
            (entry, lambda entry, start, stop: views[id(entry)][start:stop].clone()) for entry in self.layout.entries
        ]

    def bytes_of(self, kind: str) -> memoryview:
        """What follows the header in a file."""
        return self.buffer[self.layout.span(kind)]


class Packer:
    """Lays parts out; as long as they stay where they are, a copy costs no more than the copying."""

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self._order: list[int] = []
        self._parts: Sequence[Part] | None = None
        self._values: list[torch.Tensor] = []

    def values(self, parts: Sequence[Part]) -> tuple[Layout, list[torch.Tensor]]:
        """The layout of the parts, and their values in its order. The same list again is taken to be unchanged."""
        if self.layout is None or not (parts is self._parts or self.layout.fits(parts, self._order)):
            self.layout, self._order = Layout.of(parts)
            self._parts = None
        if parts is not self._parts:
            self._parts = parts
            self._values = [parts[number].values.detach() for number in self._order]
        return self.layout, self._values
