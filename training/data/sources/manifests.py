"""Manifests that are themselves the source, and lists of URLs: streamed, whatever their length."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

from training.data.entries import Entry, Listing, folder_at, printable
from training.data.findings import Finding
from training.data.redaction import without_secrets
from training.data.rows import Row, rows
from training.data.sources.config import SourceConfig
from training.data.sources.item import Embedded, Item, Linked
from training.data.sources.part import Seen, line_of, unseen
from training.data.sources.tree import add_file
from training.data.storage import confined
from training.errors import UsageError

_LOOKED_AT_ROWS = 100
_COUNTED_BYTES = 1_000_000_000
"""A longer list of URLs is not read beforehand to count them."""


@dataclass(frozen=True)
class ManifestPart:
    """A JSONL, CSV or Parquet manifest, or a ``.txt`` list of URLs; sidecars of its pictures are not read.

    Attributes:
        file: the manifest.
        prefix: before its rows' names, where it is one of several.
    """

    file: Entry
    config: SourceConfig
    prefix: str = ""

    @cached_property
    def _first(self) -> list[Row]:
        return list(itertools.islice(self._rows(), _LOOKED_AT_ROWS))

    @cached_property
    def volatile(self) -> bool:
        """See ``Part``: rows lead to URLs."""
        return any(row.url for row in self._first)

    @cached_property
    def listed_cheaply(self) -> bool:
        """See ``Part``: it lies on this machine, and is short, or so do its pictures, whose times must be looked at."""
        here = folder_at(self.file.root).local is not None
        pictures_here = self._local is not None and not any(row.url or row.cell for row in self._first)
        return here and (pictures_here or self.file.now_size() <= _COUNTED_BYTES)

    def items(self, seen: Seen = unseen) -> Iterator[Item]:
        """See ``Part``; its rows in their own order."""
        for line in self.stamps():
            seen(line)
        folders: dict[str, str | None] = {}
        for row in self._rows():
            item = self._item(row, folders)
            if isinstance(item.image, Entry):
                seen(line_of(item.image))
            yield replace(item, name=f"{self.prefix}{item.name}") if self.prefix else item

    def stamps(self) -> Iterator[str]:
        """See ``Part``: its own size and time."""
        yield line_of(self.file)

    def _rows(self) -> Iterator[Row]:
        with self.file.open() as file:
            yield from rows(self.file.name, file, self.config.url_field)

    @cached_property
    def _root(self) -> str:
        """Where its paths lead from."""
        if self.config.images is not None:
            found = folder_at(self.config.images)
            return str(found.local.resolve()) if found.local else found.place
        above = self.file.file.rpartition("/")[0]
        return f"{self.file.root}/{above}" if above else self.file.root

    @cached_property
    def _local(self) -> Path | None:
        return folder_at(self._root).local

    def _item(self, row: Row, folders: dict[str, str | None]) -> Item:
        line = f"{PurePosixPath(self.file.name).name}:{row.line}"
        if row.finding is not None:
            return Item(line, finding=row.finding)
        if row.url:
            return Item(printable(without_secrets(row.url)), Linked(row.url, self.config.download), fields=row.fields)
        if row.cell is not None:
            return Item(line, Embedded(self.file, row.cell), fields=row.fields)
        if "://" in row.path:  # the user's own keys open buckets, and the manifest may be a stranger's
            finding = Finding("outside_source", detail="a path, or an http or https URL")
            return Item(printable(without_secrets(row.path)), finding=finding)
        relative = str(PurePosixPath(row.path))
        name = printable(relative)
        found = _local_file(self._local, relative, folders) if self._local else _remote_file(self._root, relative)
        if isinstance(found, Finding):
            return Item(name, finding=found)
        return Item(name, found, fields=row.fields)


def _local_file(root: Path, relative: str, folders: dict[str, str | None]) -> Entry | Finding:
    """A picture of this machine.

    Args:
        root: resolved; nothing outside is read.
        relative: the row's path.
        folders: where the folders of earlier rows lead, ``""`` or a path with a slash below ``root``; None if outside.
    """
    above, _, base = relative.rpartition("/")
    if above not in folders:
        folders[above] = _inside(root, above)
    inside = folders[above]
    if inside is not None and base not in {"", ".", ".."}:
        with contextlib.suppress(OSError, ValueError):  # the slow way names the reason
            facts = os.lstat(f"{root}/{inside}{base}")
            if stat.S_ISREG(facts.st_mode):
                name = printable(relative)
                file = name if name == inside + base else inside + base
                return Entry(name, facts.st_size, str(root), file, 0, str(facts.st_mtime_ns))
    listing = Listing()
    add_file(listing, root, relative)
    for entry in listing.entries.values():
        return entry
    return next(iter(listing.refused.values()))


def _inside(root: Path, folder: str) -> str | None:
    try:
        found = (root / folder).resolve()
        inside = found.relative_to(root).as_posix() if not PurePosixPath(folder).is_absolute() else None
    except (OSError, ValueError, RuntimeError):
        return None
    return "" if inside == "." else inside and f"{inside}/"


def _remote_file(root: str, relative: str) -> Entry | Finding:
    """Where a picture is in a bucket; whether it is there, reading it will tell: asking first would take a day."""
    try:
        confined(relative)
    except UsageError:
        return Finding("outside_source", detail="only files inside the source are read")
    return Entry(printable(relative), None, root, relative)
