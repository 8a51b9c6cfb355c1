"""Tars and WebDataset shards, listed by header only and never extracted; few tars' members are in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from training.data.ahead import ahead
from training.data.entries import Entry, Listing, folder_at
from training.data.findings import Finding
from training.data.sources.config import SourceConfig
from training.data.sources.item import Item
from training.data.sources.known import KnownRows, is_manifest
from training.data.sources.pairs import paired
from training.data.sources.part import Seen, line_of, unseen
from training.data.tar_walk import REST, walk
from training.errors import DataError

_AHEAD = 8
"""Shards behind a network whose headers are walked at once; of so many the members are in memory."""


@dataclass(frozen=True)
class TarPart:
    """The only tar of a source."""

    file: Entry
    config: SourceConfig
    volatile: bool = False
    listed_cheaply: bool = True

    def items(self, seen: Seen = unseen) -> Iterator[Item]:
        """See ``Part``.

        Raises:
            DataError: it is no tar.
        """
        for line in self.stamps():
            seen(line)
        yield from _paired(list_tar(self.file), self.config)

    def stamps(self) -> Iterator[str]:
        """See ``Part``: its own size and time."""
        yield line_of(self.file)


@dataclass(frozen=True)
class ShardsPart:
    """Several tars, one after the other; their members are named ``shard-000000.tar/a.png``.

    Each is listed anew when it is its turn, so they are walked once, and not beforehand to count them.
    """

    files: tuple[Entry, ...]
    config: SourceConfig
    volatile: bool = False
    listed_cheaply: bool = False

    def items(self, seen: Seen = unseen) -> Iterator[Item]:
        """See ``Part``; one that is no tar is one refusal."""
        for line in self.stamps():
            seen(line)
        for file, listing in self._listings():
            try:
                for item in _paired(listing(), self.config):
                    yield replace(item, name=f"{file.name}/{item.name}")
            except DataError as error:
                reason = f"{error.message} {error.rule}"
                yield Item(file.name, finding=Finding("damaged_tar", detail=reason[:200]))

    def stamps(self) -> Iterator[str]:
        """See ``Part``: their own sizes and times."""
        return (line_of(file) for file in self.files)

    def _listings(self) -> Iterator[tuple[Entry, Callable[[], Listing]]]:
        if any(folder_at(file.root).local is None for file in self.files):
            yield from ((file, begun.result) for file, begun in ahead(list_tar, self.files, _AHEAD))
        else:
            yield from ((file, partial(list_tar, file)) for file in self.files)


def _paired(listing: Listing, config: SourceConfig) -> Iterator[Item]:
    manifests = [entry for name, entry in listing.entries.items() if is_manifest(name)]
    if not manifests:
        yield from paired(listing, None)
        return
    known = KnownRows()
    try:
        yield from known.load(manifests, config.url_field)
        yield from paired(listing, known)
        missing = Finding("missing_file", detail="named by the manifest, not in the source")
        yield from (Item(name, finding=missing) for name in known.left())
    finally:
        known.close()


def list_tar(tar: Entry) -> Listing:
    """All regular members of a plain tar; hostile ones are refused by name, nothing is written anywhere.

    ``./a.png`` and ``a.png`` are one name, as they are one file to ``tar``.

    Raises:
        DataError: not a plain tar at all; a compressed one is not unpacked, for it may unpack into anything.
    """
    listing = Listing()
    with tar.open() as file:

        def read(start: int, size: int) -> bytes:
            file.seek(start)
            return file.read(size)

        for member in walk(read, tar.now_size()):
            if member.finding is None:
                listing.add(Entry(member.name, member.size, tar.root, tar.file, member.start, tar.stamp))
            elif member.name == REST and not listing.entries and not listing.refused:
                raise DataError(
                    "The source is not a readable tar.",
                    value=f"{tar.root}/{tar.file}",
                    rule="a plain, uncompressed tar (WebDataset style pairs, or a packed folder)",
                    mend="unpack a compressed tar first, e.g. gunzip or tar xf; for a single picture, name its folder",
                )
            else:
                listing.refuse(member.name, member.finding.rule, member.finding.detail)
    return listing
