"""A walk over a tar's headers: what its members are called and where their bytes lie; nothing else of them is read."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from training.data.entries import UNSAFE_ENDINGS, printable
from training.data.findings import Finding

BLOCK = 512
_ADLER = 65521
_MAX_LONG_BYTES = 1_000_000
"""What a long name or an extended header may take."""
_REGULAR = {b"0", b"\0", b"7"}
_LONG_NAME, _EXTENDED, _FOLDER, _SPARSE = b"L", {b"x", b"X"}, b"5", b"S"
_OF_THE_NEXT = {_LONG_NAME, b"K", *_EXTENDED, b"g"}
"""Headers that say something of the member after them: its long name or link, or PAX records."""
_EMPTY = {b"1", b"2", b"3", b"4", _FOLDER, b"6"}
"""Kinds without bytes, whatever size their headers say."""

REST = "(rest of the tar)"
"""What is called so begins with a header that cannot be believed."""

_UNPICKLED = frozenset(ending.removeprefix(".") for ending in UNSAFE_ENDINGS)

Read = Callable[[int, int], bytes]
"""``read(start, size)``: bytes of the tar, fewer at its end."""


@dataclass(frozen=True, slots=True)
class Member:
    """One member of a tar.

    Attributes:
        name: printable, with ``/``.
        header: where its first header begins, those of a long name included.
        start: of its bytes.
        size: of its bytes.
        finding: why it must not be used, if so.
    """

    name: str
    header: int
    start: int
    size: int
    finding: Finding | None = None


class _DamagedError(Exception):
    """A header that cannot be believed; what follows it cannot be found."""


def walk(read: Read, length: int) -> Iterator[Member]:
    """The members of a plain tar, POSIX, GNU or older, in their order.

    What a header says is believed only where its checksum is right and its bytes are there. Links, devices, sparse
    files, pickles and names that lead outside come with a finding; so does the rest of a tar from the first damaged
    header on, under the name ``REST``. Folders are left out. Nothing is unpacked or unpickled.

    Args:
        read: reads the tar.
        length: bytes of the tar.
    """
    at, first, count = 0, 0, 0
    name, said = "", _Extended()
    try:
        while at < length:
            header = read(at, BLOCK)
            if header.count(0) == len(header):
                return
            kind, size = _checked(header)
            start = at + BLOCK
            if kind in _OF_THE_NEXT:
                data = _long(read, start, size)
                name = _text(data) if kind == _LONG_NAME else name
                said = _extended(data) if kind in _EXTENDED else said
            else:
                size = 0 if kind in _EMPTY else size if said.size is None else said.size
                start += _sparse_map(read, header, start) if kind == _SPARSE else 0
            if start + size > length:
                why = f"its header says {size} bytes, and the tar ends before"
                if kind not in _OF_THE_NEXT:
                    liar = _member(said.path or name or _short(header), kind, said, (first, start, 0))
                    yield replace(liar, finding=Finding("damaged_tar", detail=why))
                raise _DamagedError(why)
            at = start + (size + BLOCK - 1) // BLOCK * BLOCK
            if kind in _OF_THE_NEXT:
                continue
            count += 1
            if kind != _FOLDER:
                yield _member(said.path or name or _short(header), kind, said, (first, start, size))
            name, said, first = "", _Extended(), at
    except _DamagedError as error:
        finding = Finding("damaged_tar", detail=f"after {count} members: {error}"[:200])
        yield Member(REST, at, at, 0, finding)


@dataclass(frozen=True, slots=True)
class _Extended:
    """What an extended header says of the member that follows it."""

    path: str = ""
    size: int | None = None
    sparse: bool = False


def _checked(header: bytes) -> tuple[bytes, int]:
    """A header's kind and size, once its checksum was compared."""
    if len(header) < BLOCK:
        raise _DamagedError("the tar ends within a header")
    # the sum of all bytes, those of the checksum itself taken for blanks; Adler's sum counts from 1 and is much faster
    found = zlib.adler32(header[156:], zlib.adler32(b" " * 8, zlib.adler32(header[:148]))) & 0xFFFF
    if (_number(header[148:156]) + 1) % _ADLER != found:
        raise _DamagedError("a header's checksum is wrong")
    return header[156:157], _number(header[124:136])


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU: base 256, for what octal digits cannot say
        if field[0] != 0x80:
            raise _DamagedError("a header says a negative number")
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not digits.isdigit():
        raise _DamagedError("a header holds no number where one must be")
    try:
        return int(digits, 8)
    except ValueError as error:
        raise _DamagedError("a header holds no octal number where one must be") from error


def _long(read: Read, start: int, size: int) -> bytes:
    if size > _MAX_LONG_BYTES:
        raise _DamagedError(f"a long name or extended header of {size} bytes")
    return read(start, size)


def _sparse_map(read: Read, header: bytes, start: int) -> int:
    """Bytes of the blocks between a GNU sparse member's header and its data."""
    size, more = 0, header[482]
    while more:
        block = read(start + size, BLOCK)
        if len(block) < BLOCK or size > _MAX_LONG_BYTES:
            raise _DamagedError("a sparse member's map cannot be read")
        size, more = size + BLOCK, block[504]
    return size


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "replace")


def _short(header: bytes) -> str:
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:  # GNU writes something else there, and another magic
        return f"{_text(header[345:500])}/{name}"
    return name


def _extended(data: bytes) -> _Extended:
    """The records of a PAX header: ``<length> <key>=<value>`` and a line's end."""
    path, size, sparse, at = "", None, False, 0
    while at < len(data) and data[at]:
        digits, space, _ = data[at : at + 20].partition(b" ")
        if not space or not digits.isdigit() or not len(digits) + 3 <= int(digits) <= len(data) - at:
            raise _DamagedError("an extended header cannot be read")
        key, _, value = data[at + len(digits) + 1 : at + int(digits) - 1].partition(b"=")
        if key == b"path":
            path = _text(value)
        elif key == b"size":
            if not value.isdigit() or len(value) > 20:
                raise _DamagedError("an extended header holds no number where one must be")
            size = int(value)
        sparse = sparse or key.startswith(b"GNU.sparse")
        at += int(digits)
    return _Extended(path, size, sparse)


def _member(name: str, kind: bytes, said: _Extended, place: tuple[int, int, int]) -> Member:
    finding = None
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\\" in name or not name.strip("./"):
        finding = Finding("unsafe_name", detail="absolute, or leaves the tar through '..' or a backslash")
    elif kind not in _REGULAR or said.sparse:
        finding = Finding("not_a_file", detail="a link, device, pipe, sparse file or unknown type")
    elif not _UNPICKLED.isdisjoint(parts[-1].lower().split(".")[1:]):
        finding = Finding("unsafe_member", detail="a pickle, which can run anything; not read")
    if "" in parts or "." in parts:  # ./a.png and a.png are one name, as they are one file to tar
        name = str(PurePosixPath(name))
    return Member(name if name.isascii() and name.isprintable() else printable(name), *place, finding)
