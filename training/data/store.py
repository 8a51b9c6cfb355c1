"""What every kind of storage can do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored file.

    Attributes:
        name: relative to its folder, with ``/``.
        size: bytes.
        stamp: another one once the content has changed: an object's ETag, a local file's time of change.
    """

    name: str
    size: int
    stamp: str


class Store(Protocol):
    """One folder's files; names were checked by ``storage.Folder``, whose methods say what each of these does."""

    def read(self, name: str) -> bytes:
        """All bytes."""

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """Some bytes; ``size`` is at least 1."""

    def stat(self, name: str) -> Stored:
        """Size and stamp."""

    def write(self, name: str, data: bytes) -> None:
        """All or nothing."""

    def upload(self, path: Path, name: str) -> None:
        """From a local file."""

    def download(self, name: str, path: Path) -> None:
        """Into a local file."""

    def files(self, prefix: str) -> Iterator[Stored]:
        """All files below, sorted by name."""

    def remove(self, name: str) -> None:
        """No file of this name is left."""
