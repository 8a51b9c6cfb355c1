"""The first stage of a build: the source is cut into blocks of inputs, the units that are judged anew or not at all."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from training.data.sources import Item, Source

BLOCK_INPUTS = 256
"""About a second of work: little is lost by a kill, and little is paid for a part."""


@dataclass(frozen=True)
class Block:
    """Consecutive inputs of a source.

    Attributes:
        number: position among the blocks, from 0.
        first: the number of its first input.
        items: the inputs.
    """

    number: int
    first: int
    items: tuple[Item, ...]

    @cached_property
    def name(self) -> str:
        """Names the inputs: another file, size, time or caption among them gives another name."""
        return f"{self.number:08d}-{hashlib.sha256(repr(self.items).encode('utf-8', 'replace')).hexdigest()[:32]}"

    @property
    def seconds(self) -> float:
        """How long it takes to judge, roughly."""
        return 0.002 * len(self.items)

    def describe(self) -> str:
        """The block for an error."""
        last = self.items[-1].name
        return f"inputs {self.first} to {self.first + len(self.items) - 1}, {self.items[0].name} to {last}"


def blocks(source: Source, inputs: int) -> Iterator[Block]:
    """The source in order, ``inputs`` at a time; one block is in memory."""
    items = iter(source)
    for number in itertools.count():
        part = tuple(itertools.islice(items, inputs))
        if not part:
            return
        yield Block(number, number * inputs, part)
