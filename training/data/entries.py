"""The files of a folder and the members of a tar, listed by header only and never extracted."""

from __future__ import annotations

import itertools
import os
import stat
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from training.data.clean import Finding, Rule
from training.errors import DataError


@dataclass(frozen=True)
class Entry:
    """One readable file.

    Attributes:
        name: its path within the source, printable, with ``/``.
        size: bytes.
        read: all its bytes; raises OSError.
        stamp: what changes when the file is changed in place, for a quick comparison of two visits.
    """

    name: str
    size: int
    read: Callable[[], bytes]
    stamp: str


@dataclass
class Listing:
    """The entries of a source by name, and what was refused by name."""

    entries: dict[str, Entry] = field(default_factory=dict)
    refused: dict[str, Finding] = field(default_factory=dict)

    def refuse(self, name: str, rule: Rule, detail: str) -> None:
        """Note that ``name`` is not used; a second refusal of the same name is numbered."""
        unique, number = name, 2
        while unique in self.refused or unique in self.entries:
            unique, number = f"{name} (#{number})", number + 1
        self.refused[unique] = Finding(rule, detail=detail)


def printable(name: str) -> str:
    """A name that every terminal and JSON reader can take: undecodable bytes and control characters replaced."""
    text = name.encode("utf-8", "replace").decode()
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def list_folder(folder: Path) -> Listing:
    """All files below ``folder`` but hidden ones; links are followed only to files that stay inside.

    Raises:
        DataError: the folder cannot be listed.
    """
    listing = Listing()
    root = folder.resolve()

    def fail(error: OSError) -> None:
        raise DataError("The folder cannot be read.", value=str(error.filename), rule=error.strerror) from error

    for place, folders, files in os.walk(root, onerror=fail):
        visible = sorted(name for name in folders if not name.startswith("."))
        linked = [name for name in visible if Path(place, name).is_symlink()]
        folders[:] = [name for name in visible if name not in linked]
        for name in linked:
            relative = Path(place, name).relative_to(root).as_posix()
            listing.refuse(printable(relative), "not_a_file", "a link to a folder is not followed")
        for name in sorted(files):
            if not name.startswith("."):
                add_file(listing, root, Path(place, name).relative_to(root).as_posix())
    return listing


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
    except (OSError, ValueError, RuntimeError) as error:  # also a NUL in the name, or a loop of links
        listing.refuse(name, "unreadable", str(error)[:200])
        return
    if not stat.S_ISREG(facts.st_mode):
        listing.refuse(name, "not_a_file", "a folder, pipe, socket or device")
    elif name in listing.entries:
        listing.refuse(name, "duplicate_name", "two names look the same once printable")
    else:
        listing.entries[name] = Entry(name, facts.st_size, target.read_bytes, f"{facts.st_size} {facts.st_mtime_ns}")


def list_tar(path: Path) -> Listing:
    """All regular members of a plain tar; hostile ones are refused by name, nothing is written anywhere.

    Raises:
        DataError: not a plain tar at all.
    """
    listing = Listing()
    stamp = str(path.stat().st_mtime_ns)
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in _members(archive, file, listing):
                refusal = _hostile(member)
                name = printable(member.name)
                if refusal is not None:
                    listing.refuse(name, *refusal)
                elif name in listing.entries:
                    listing.refuse(name, "duplicate_name", "a second member of this name")
                elif not member.isdir():
                    read = _member_reader(path, member.offset_data, member.size)
                    listing.entries[name] = Entry(name, member.size, read, f"{stamp} {member.offset_data}")
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            "The source is not a readable tar.",
            value=str(path),
            rule="a plain, uncompressed tar (WebDataset style pairs, or a packed folder)",
            mend="unpack a compressed tar first, e.g. gunzip or tar xf",
        ) from error
    return listing


def _members(archive: tarfile.TarFile, file: BinaryIO, listing: Listing) -> Iterable[tarfile.TarInfo]:
    """Members up to the first damaged header; the rest of the tar is one refusal."""
    for count in itertools.count():
        try:
            member = archive.next()
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            listing.refuse("(rest of the tar)", "damaged_tar", f"after {count} members: {error}"[:200])
            return
        if member is None:
            if not _ends_cleanly(archive, file):
                listing.refuse("(rest of the tar)", "damaged_tar", f"no header after {count} members")
            return
        yield member


def _ends_cleanly(archive: tarfile.TarFile, file: BinaryIO) -> bool:
    """Python takes a damaged header for the end; the real end is a block of zeros or of the file."""
    file.seek(archive.offset)
    return not file.read(tarfile.BLOCKSIZE).strip(b"\0")


def _hostile(member: tarfile.TarInfo) -> tuple[Rule, str] | None:
    parts = PurePosixPath(member.name).parts
    if not parts or member.name.startswith("/") or ".." in parts or "\\" in member.name or "\0" in member.name:
        return "unsafe_name", "absolute, or leaves the tar through '..' or a backslash"
    if member.issym() or member.islnk():
        return "not_a_file", f"a link to {printable(member.linkname)}"[:200]
    if member.issparse() or not (member.isreg() or member.isdir()):
        return "not_a_file", "a device, pipe, sparse file or unknown type"
    return None


def _member_reader(path: Path, offset: int, size: int) -> Callable[[], bytes]:
    def read() -> bytes:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise OSError(f"the tar ends {size - len(data)} bytes early")
        return data

    return read
