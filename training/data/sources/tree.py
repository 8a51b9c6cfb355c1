"""A folder of pictures, one directory at a time: of this machine, or below a prefix of a bucket."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Protocol

from training.data.entries import Entry, Listing, folder_at, printable
from training.data.storage import confined
from training.data.store import Stored
from training.errors import DataError, UsageError


class Tree(Protocol):
    """Directories that can be listed; hidden files and folders are never among them."""

    @property
    def place(self) -> str:
        """Where it is: an absolute path, or a URL."""

    def level(self, inside: str) -> Listing:
        """What lies directly in a directory, ``""`` for the top; entries are named from the top."""

    def names(self) -> Iterator[str]:
        """All files' names from the top, in no order, read as far as they are taken."""


class LocalTree:
    """A folder of this machine; links are followed only to files that stay inside."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self.place = str(self._root)

    def level(self, inside: str) -> Listing:
        """See ``Tree``; a folder that cannot be listed is a refusal.

        Raises:
            DataError: the top cannot be listed.
        """
        listing = Listing()
        try:
            with os.scandir(str(self._root / inside)) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            if not inside:
                raise DataError("The folder cannot be read.", value=self.place, rule=error.strerror) from error
            listing.refuse(printable(inside), "unreadable", f"a folder: {error.strerror}")
            return listing
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            relative = f"{inside}/{entry.name}" if inside else entry.name
            if entry.is_file(follow_symlinks=False):
                self._add(listing, entry, relative)
            elif not _is_folder(entry):
                add_file(listing, self._root, relative)
            elif entry.is_symlink():
                listing.refuse(printable(relative), "not_a_file", "a link to a folder is not followed")
            else:
                listing.folders.append(relative)
        return listing

    def _add(self, listing: Listing, entry: os.DirEntry[str], relative: str) -> None:
        """A plain file, which leads nowhere else: most are, and looking where it leads would take most of the time."""
        name = printable(relative)
        try:
            facts = entry.stat(follow_symlinks=False)
        except OSError as error:
            listing.refuse(name, "unreadable", error.strerror or type(error).__name__)
        else:
            file = name if name == relative else relative  # of equal strings one is kept: there may be millions
            listing.add(Entry(name, facts.st_size, self.place, file, 0, str(facts.st_mtime_ns)))

    def names(self) -> Iterator[str]:
        """See ``Tree``."""
        for place, folders, files in os.walk(self._root):
            folders[:] = [name for name in folders if not _is_hidden(name)]
            inside = Path(place).relative_to(self._root).as_posix()
            above = "" if inside == "." else f"{inside}/"
            yield from (above + name for name in files if not _is_hidden(name))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # its folder may be listed but not entered; ``add_file`` says so
        return False


def add_file(listing: Listing, root: Path, relative: str) -> None:
    """List one file of a resolved ``root``, or refuse it if it is none or lies outside."""
    name, path = printable(relative), root / relative
    try:
        target = path.resolve()
        if PurePosixPath(relative).is_absolute() or not target.is_relative_to(root):
            listing.refuse(name, "outside_source", "only files inside the source are read")
            return
        facts = target.stat()
    except FileNotFoundError:
        listing.refuse(name, "missing_file", "no such file")
        return
    except RuntimeError:  # pathlib's; its message holds the absolute path, and two copies must give equal ledgers
        listing.refuse(name, "unreadable", "a loop of links")
        return
    except OSError as error:
        listing.refuse(name, "unreadable", error.strerror or type(error).__name__)
        return
    except ValueError as error:  # a NUL in the name
        listing.refuse(name, "unreadable", str(error)[:200])
        return
    if not stat.S_ISREG(facts.st_mode):
        listing.refuse(name, "not_a_file", "a folder, pipe, socket or device")
        return
    inside = target.relative_to(root).as_posix()
    file = name if inside == name else inside  # of equal strings one is kept: there may be millions
    listing.add(Entry(name, facts.st_size, str(root), file, 0, str(facts.st_mtime_ns)))


class RemoteTree:
    """A prefix of a bucket. Its listing is asked for once and held; for billions of objects, name them in a manifest.

    Args:
        place: a URL.
    """

    def __init__(self, place: str) -> None:
        self._folder = folder_at(place)
        self.place = self._folder.place
        self._files: dict[str, list[Stored]] | None = None
        self._folders: dict[str, set[str]] = {}

    def level(self, inside: str) -> Listing:
        """See ``Tree``."""
        files = self._listed().get(inside, ())
        listing = Listing(folders=sorted(self._folders.get(inside, ())))
        for stored in files:
            name = printable(stored.name)
            try:
                confined(stored.name)
            except UsageError:
                listing.refuse(name, "unsafe_name", "not a plain path below the source")
            else:
                listing.add(Entry(name, stored.size, self.place, stored.name, 0, stored.stamp))
        return listing

    def names(self) -> Iterator[str]:
        """See ``Tree``."""
        return (stored.name for files in self._listed().values() for stored in files)

    def _listed(self) -> dict[str, list[Stored]]:
        if self._files is None:
            self._files = {}
            for stored in self._folder.files():
                inside, _, name = stored.name.rpartition("/")
                if name and not any(_is_hidden(part) for part in stored.name.split("/")):
                    self._files.setdefault(inside, []).append(stored)
            for inside in self._files:
                parts = inside.split("/") if inside else []
                for depth in range(len(parts)):
                    self._folders.setdefault("/".join(parts[:depth]), set()).add("/".join(parts[: depth + 1]))
        return self._files


def _is_hidden(part: str) -> bool:
    return part.startswith(".") and part not in {".", ".."}
