"""The files of a folder and the members of a tar, listed by header only and never extracted."""

from __future__ import annotations

import io
import itertools
import os
import stat
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from training.data.clean import Finding, Rule
from training.errors import DataError

_MAX_HEADER_BYTES = 1_000_000
"""What one header of a tar may ask to be read, long names and extended headers included."""

_DAMAGE = (tarfile.TarError, OSError, ValueError, OverflowError, IndexError, RecursionError)
"""What ``tarfile`` raises for damaged and for hostile headers."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One readable file, or the part of a tar that is a member.

    Attributes:
        name: its path within the source, printable, with ``/``.
        size: bytes.
        root: the source: a resolved folder or a tar; one string for all entries.
        file: the file below ``root`` that holds the bytes, the same string as ``name`` if it can be; ``""`` in a tar.
        start: of the first byte within the file.
        changed_ns: when the file was last written, for a quick comparison of two visits.
    """

    name: str
    size: int
    root: str
    file: str
    start: int
    changed_ns: int

    def read(self) -> bytes:
        """Its bytes, as many as were listed: a file that grew meanwhile is not read beyond.

        Raises:
            OSError: it cannot be read, or ends early.
        """
        with Path(self.root, self.file).open("rb") as file:
            file.seek(self.start)
            data = file.read(self.size)
        if len(data) != self.size:
            raise OSError(f"the file ends {self.size - len(data)} bytes early")
        return data


@dataclass
class Listing:
    """The entries of a source by name, and what was refused by name."""

    entries: dict[str, Entry] = field(default_factory=dict)
    refused: dict[str, Finding] = field(default_factory=dict)
    _numbers: dict[str, int] = field(default_factory=dict)

    def refuse(self, name: str, rule: Rule, detail: str) -> None:
        """Note that ``name`` is not used; a second refusal of the same name is numbered."""
        unique = name
        while unique in self.refused or unique in self.entries:
            # each name counts on from its last number: a million members of one name take a million steps
            self._numbers[name] = number = self._numbers.get(name, 1) + 1
            unique = f"{name} (#{number})"
        self.refused[unique] = Finding(rule, detail=detail)


def printable(name: str) -> str:
    """A name that every terminal and JSON reader can take: undecodable bytes and control characters replaced."""
    text = name.encode("utf-8", "replace").decode()
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def list_folder(folder: Path) -> Listing:
    """All files below ``folder`` but hidden ones; links are followed only to files that stay inside.

    A folder inside it that cannot be listed is a refusal.

    Raises:
        DataError: ``folder`` itself cannot be listed.
    """
    listing = Listing()
    root = folder.resolve()

    def fail(error: OSError) -> None:
        place = Path(error.filename)
        if place == root:
            raise DataError("The folder cannot be read.", value=str(place), rule=error.strerror) from error
        listing.refuse(printable(place.relative_to(root).as_posix()), "unreadable", f"a folder: {error.strerror}")

    for place, folders, files in os.walk(root, onerror=fail):
        visible = sorted(name for name in folders if not name.startswith("."))
        linked = [name for name in visible if _is_link(Path(place, name))]
        folders[:] = [name for name in visible if name not in linked]
        for name in linked:
            relative = Path(place, name).relative_to(root).as_posix()
            listing.refuse(printable(relative), "not_a_file", "a link to a folder is not followed")
        for name in sorted(files):
            if not name.startswith("."):
                add_file(listing, root, Path(place, name).relative_to(root).as_posix())
    return listing


def _is_link(path: Path) -> bool:
    try:
        return path.is_symlink()
    except OSError:  # its folder may be listed but not entered; the walk names it next
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
    elif name in listing.entries:
        listing.refuse(name, "duplicate_name", "two names look the same once printable")
    else:
        inside = target.relative_to(root).as_posix()
        file = name if inside == name else inside  # of equal strings one is kept: there may be millions
        listing.entries[name] = Entry(name, facts.st_size, str(root), file, 0, facts.st_mtime_ns)


def list_tar(path: Path) -> Listing:
    """All regular members of a plain tar; hostile ones are refused by name, nothing is written anywhere.

    ``./a.png`` and ``a.png`` are one name, as they are one file to ``tar``.

    Raises:
        DataError: not a plain tar at all.
    """
    listing = Listing()
    place, changed_ns = str(path), path.stat().st_mtime_ns
    try:
        with _Headers(io.FileIO(path)) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in _members(archive, file, listing):
                if member.isdir():
                    continue
                refusal = _hostile(member)
                name = printable(str(PurePosixPath(member.name)))
                if refusal is not None:
                    listing.refuse(name, *refusal)
                elif name in listing.entries:
                    listing.refuse(name, "duplicate_name", "a second member of this name")
                else:
                    listing.entries[name] = Entry(name, member.size, place, "", member.offset_data, changed_ns)
    except _DAMAGE as error:
        raise DataError(
            "The source is not a readable tar.",
            value=place,
            rule="a plain, uncompressed tar (WebDataset style pairs, or a packed folder)",
            mend="unpack a compressed tar first, e.g. gunzip or tar xf",
        ) from error
    return listing


class _Headers(io.BufferedReader):
    """A tar's file for ``tarfile``, which reads as much as a header asks for: the whole tar into memory, at worst."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header asks for {size} bytes")
        return super().read(size)


def _members(archive: tarfile.TarFile, file: io.BufferedReader, listing: Listing) -> Iterable[tarfile.TarInfo]:
    """Members up to the first damaged header; the rest of the tar is one refusal."""
    for count in itertools.count():
        before = archive.offset if count else 0  # opening has read the first one
        try:
            member = archive.next()
        except _DAMAGE as error:
            # how deep is too deep depends on the caller's stack, and ledgers must be equal
            why = "too many headers in a row" if isinstance(error, RecursionError) else str(error)
            listing.refuse("(rest of the tar)", "damaged_tar", f"after {count} members: {why}"[:200])
            return
        archive.members.clear()  # type: ignore[attr-defined]  # it keeps all, for a second walk that never comes
        if member is None:
            if not _ends_cleanly(archive, file):
                listing.refuse("(rest of the tar)", "damaged_tar", f"no header after {count} members")
            return
        if member.size < 0 or archive.offset <= before:
            listing.refuse("(rest of the tar)", "damaged_tar", f"after {count} members: a header leads backwards")
            return
        yield member


def _ends_cleanly(archive: tarfile.TarFile, file: io.BufferedReader) -> bool:
    """Python takes a damaged header for the end; the real end is a block of zeros or of the file."""
    file.seek(archive.offset)
    return not file.read(tarfile.BLOCKSIZE).strip(b"\0")


def _hostile(member: tarfile.TarInfo) -> tuple[Rule, str] | None:
    parts = PurePosixPath(member.name).parts
    if not parts or member.name.startswith("/") or ".." in parts or "\\" in member.name or "\0" in member.name:
        return "unsafe_name", "absolute, or leaves the tar through '..' or a backslash"
    if member.issym() or member.islnk():
        return "not_a_file", f"a link to {printable(member.linkname)}"[:200]
    if member.issparse() or not member.isreg():
        return "not_a_file", "a device, pipe, sparse file or unknown type"
    return None
