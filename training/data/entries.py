"""Readable parts of a source: whole files, or members of a tar; on this machine or behind a network."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from training.data.findings import Finding, Rule
from training.data.storage import Folder

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

UNSAFE_ENDINGS = frozenset({".pkl", ".pickle", ".dill", ".joblib", ".pyd", ".pth", ".pt", ".ckpt"})
"""Files that other readers of WebDataset shards would unpickle, and so run; here they are not even read."""

_LOCAL_BLOCK_BYTES = 1 << 16
_REMOTE_BLOCK_BYTES = 1 << 23
"""What one request to a bucket brings: reading through a tar's headers takes one for many of them."""
_GAP_BYTES = 1 << 16
"""Bytes between two members that are sooner read than a second request is answered."""


@lru_cache(maxsize=64)
def folder_at(place: str) -> Folder:
    """The folder at a place, the same object each time: it keeps what it found out about its storage."""
    return Folder.at(place)


@dataclass(frozen=True, slots=True)
class Entry:
    """One readable file, or the part of a tar that is a member.

    Attributes:
        name: its path within the source, printable, with ``/``.
        size: bytes; None where nobody has asked yet.
        root: the folder that ``file`` lies in; one string for all entries of a source.
        file: the file below ``root`` that holds the bytes, the same string as ``name`` if it can be.
        start: of the first byte within the file.
        stamp: another one once the file was written anew, for a quick comparison of two visits.
    """

    name: str
    size: int | None
    root: str
    file: str
    start: int = 0
    stamp: str = ""

    def now_size(self) -> int:
        """Its size, asked for where it is not known.

        Raises:
            OSError: it is not there.
        """
        return folder_at(self.root).size(self.file) if self.size is None else self.size

    def read(self) -> bytes:
        """Its bytes, as many as were listed: a file that grew meanwhile is not read beyond.

        Raises:
            OSError: it cannot be read, or ends early.
            StorageError: storage behind a network does not answer.
        """
        size, folder = self.now_size(), folder_at(self.root)
        if folder.local is None:
            data = folder.read_range(self.file, self.start, size)
        else:
            with Path(self.root, self.file).open("rb") as file:
                file.seek(self.start)
                data = file.read(size)
        if len(data) != size:
            raise OSError(f"the file ends {size - len(data)} bytes early")
        return data

    def open(self) -> io.BufferedReader:
        """A seekable stream of its bytes, read in blocks.

        Raises:
            OSError: it is not there.
        """
        remote = folder_at(self.root).local is None
        return io.BufferedReader(RangeFile(self), _REMOTE_BLOCK_BYTES if remote else _LOCAL_BLOCK_BYTES)


def read_together(picture: Entry, beside: Sequence[Entry | None]) -> tuple[bytes, list[bytes | None]]:
    """The bytes of several entries; members of one remote tar that lie close together come with one request.

    Raises:
        OSError: one cannot be read, or ends early.
        StorageError: storage behind a network does not answer.
    """
    known = [picture, *(entry for entry in beside if entry is not None)]
    if len({(entry.root, entry.file) for entry in known}) == 1 < len(known) and folder_at(picture.root).local is None:
        first = min(entry.start for entry in known)
        size = max(entry.start + entry.now_size() for entry in known) - first
        if size <= sum(entry.now_size() for entry in known) + _GAP_BYTES:
            whole = replace(picture, start=first, size=size).read()
            parts = {entry: whole[entry.start - first :][: entry.now_size()] for entry in known}
            return parts[picture], [None if entry is None else parts[entry] for entry in beside]
    return picture.read(), [None if entry is None else entry.read() for entry in beside]


def entry_at(place: str | Path) -> Entry:
    """A single file, as an entry of the folder that it lies in.

    Raises:
        OSError: it is not there.
    """
    whole = Folder.at(place)
    above, _, name = (str(whole.local.resolve()) if whole.local else whole.place).rpartition("/")
    known = folder_at(above or "/").stat(name)
    return Entry(printable(name), known.size, above or "/", name, 0, known.stamp)


class RangeFile(io.RawIOBase):
    """An entry as a file: each read is one ranged request."""

    def __init__(self, entry: Entry) -> None:
        super().__init__()
        self._entry = entry
        self._size = entry.now_size()
        self._at = 0
        folder = folder_at(entry.root)
        self._local = None if folder.local is None else io.FileIO(Path(entry.root, entry.file))

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fill what can be filled from here on."""
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._size - self._at))
        start = self._entry.start + self._at
        if not wanted:
            return 0
        if self._local is not None:
            self._local.seek(start)
            data = self._local.read(wanted)
        else:
            data = folder_at(self._entry.root).read_range(self._entry.file, start, wanted)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Read on from elsewhere."""
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def close(self) -> None:
        """Close the file of this machine, if it is one."""
        if self._local is not None:
            self._local.close()
        super().close()


@dataclass
class Listing:
    """The entries of a folder or tar by name, its folders, and what was refused by name."""

    entries: dict[str, Entry] = field(default_factory=dict)
    refused: dict[str, Finding] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    _numbers: dict[str, int] = field(default_factory=dict)

    def refuse(self, name: str, rule: Rule, detail: str) -> None:
        """Note that ``name`` is not used; a second refusal of the same name is numbered."""
        unique = name
        while unique in self.refused or unique in self.entries:
            # each name counts on from its last number: a million members of one name take a million steps
            self._numbers[name] = number = self._numbers.get(name, 1) + 1
            unique = f"{name} (#{number})"
        self.refused[unique] = Finding(rule, detail=detail)

    def add(self, entry: Entry) -> None:
        """Note an entry, unless its name is taken or says that it is for unpickling."""
        base = entry.name.rpartition("/")[2].lower()
        if not UNSAFE_ENDINGS.isdisjoint(f".{ending}" for ending in base.split(".")[1:]):
            self.refuse(entry.name, "unsafe_member", "a pickle, which can run anything; not read")
        elif entry.name in self.entries:
            self.refuse(entry.name, "duplicate_name", "a second one of this name")
        else:
            self.entries[entry.name] = entry


def printable(name: str) -> str:
    """A name that every terminal and JSON reader can take: undecodable bytes and control characters replaced."""
    if name.isprintable():
        return name
    text = name.encode("utf-8", "replace").decode()
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
