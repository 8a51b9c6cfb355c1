"""What a source is made of: a folder, a tar, or a manifest; most have one of them, a set of shards has thousands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from training.data.entries import Entry, Listing
from training.data.findings import Finding
from training.data.sources.item import Item

Seen = Callable[[str], None]
"""Told about each file that is come by: its name, size and stamp, as one line."""


def unseen(_line: str) -> None:
    """Nobody asks."""


class Part(Protocol):
    """A stream of inputs, the same each time that it is asked for."""

    @property
    def listed_cheaply(self) -> bool:
        """Whether all inputs can be listed much faster than they are read, so that they can be counted beforehand."""

    @property
    def volatile(self) -> bool:
        """Whether the same list may bring other pictures next time."""

    def items(self, seen: Seen = unseen) -> Iterator[Item]:
        """The inputs, in their order; reads no picture.

        Args:
            seen: told about the files that they come from.

        Raises:
            DataError: it cannot be read at all.
        """

    def stamps(self) -> Iterator[str]:
        """Lines that change when it does, had without listing the inputs."""


@dataclass(frozen=True)
class RefusedPart:
    """What lies among the files of a set and is not read, by name."""

    refused: Mapping[str, Finding]
    volatile: bool = False
    listed_cheaply: bool = True

    def items(self, seen: Seen = unseen) -> Iterator[Item]:
        """See ``Part``."""
        for line in self.stamps():
            seen(line)
        yield from (
            Item(name, finding=finding) for name, finding in sorted(self.refused.items(), key=lambda pair: pair[0])
        )

    def stamps(self) -> Iterator[str]:
        """See ``Part``."""
        yield from (
            f"{name} {finding.rule}" for name, finding in sorted(self.refused.items(), key=lambda pair: pair[0])
        )


def line_of(entry: Entry) -> str:
    """What ``Seen`` is told about an entry."""
    return f"{entry.name} {entry.size} {entry.start} {entry.stamp}"


def tell(listing: Listing, seen: Seen) -> None:
    """Tell about a whole listing."""
    for name in sorted(listing.entries):
        seen(line_of(listing.entries[name]))
    for name in sorted(listing.refused):
        seen(f"{name} {listing.refused[name].rule}")
