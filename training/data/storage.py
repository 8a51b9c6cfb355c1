"""A folder on any storage: a path of this machine, ``s3://``, ``gs://`` or ``hf://``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from training.data.local_store import LocalStore
from training.data.remote_store import PROTOCOLS, RemoteStore
from training.data.store import Store, Stored
from training.errors import UsageError

__all__ = ["Folder", "Stored", "is_remote"]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_ALIASES = {"s3a": "s3", "gcs": "gs"}


def is_remote(place: str | Path) -> bool:
    """Whether a place is on storage behind a network and no path of this machine."""
    found = None if isinstance(place, Path) else _URL.fullmatch(place)
    return found is not None and found[1].lower() != "file"


@dataclass(frozen=True)
class Folder:
    """A folder; it need not exist. It pickles, for credentials are no part of it: each process has them of its own.

    Names are relative, with ``/``, and stay inside the folder. All methods raise ``StorageError`` where storage
    refuses or does not answer after a few patient retries, and ``UsageError`` for a name that leaves the folder.

    Attributes:
        place: an absolute path, or a URL without a slash at its end.
    """

    place: str

    @classmethod
    def at(cls, place: str | Path) -> Folder:
        """The folder at a path or URL.

        Raises:
            UsageError: a kind of storage that is not supported, or a place that names none.
        """
        found = None if isinstance(place, Path) else _URL.fullmatch(place)
        if found is None:
            return cls(str(Path(place).absolute()))
        protocol = _ALIASES.get(found[1].lower(), found[1].lower())
        if protocol == "file":
            return cls(str(Path(unquote(found[2])).absolute()))
        if protocol not in PROTOCOLS:
            options = ["a path", *(f"{known}://" for known in PROTOCOLS)]
            raise UsageError(
                "There is no such storage.", value=f"{found[1]}://", rule="a supported kind of storage", options=options
            )
        path = found[2].strip("/")
        if "@" in path.partition("/")[0] and protocol != "hf":
            raise UsageError(  # the value may hold a secret and is not shown
                "Credentials do not belong into a place.",
                rule=f"{protocol}://bucket/folder",
                mend="set the credentials in the environment",
            )
        if not path and protocol != "memory":
            raise UsageError("The place names no bucket.", value=str(place), rule=f"{protocol}://bucket/folder")
        if ".." in path.split("/"):
            raise UsageError("A URL must not go up.", value=str(place), rule="no '..' in it")
        return cls(f"{protocol}://{path}")

    @property
    def local(self) -> Path | None:
        """Its path where it is on this machine's file system."""
        return None if is_remote(self.place) else Path(self.place)

    @cached_property
    def _store(self) -> Store:
        protocol, found, path = self.place.partition("://")
        return RemoteStore(protocol, path) if found and is_remote(self.place) else LocalStore(Path(self.place))

    def __getstate__(self) -> dict[str, str]:
        return {"place": self.place}

    def __str__(self) -> str:
        return self.place

    def child(self, name: str) -> Folder:
        """A folder below."""
        return Folder(f"{self.place.rstrip('/')}/{confined(name)}")

    def url(self, name: str) -> str:
        """The place of a file below, for messages."""
        return f"{self.place.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes:
        """All bytes of a file.

        Raises:
            FileNotFoundError: there is none.
        """
        return self._store.read(confined(name))

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """``size`` bytes from ``start`` on; fewer where the file ends before.

        Raises:
            FileNotFoundError: there is no such file.
        """
        if start < 0 or size < 0:
            raise UsageError("A range must lie in the file.", value=(start, size), rule="start >= 0 and size >= 0")
        return self._store.read_range(confined(name), start, size) if size else b""

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            FileNotFoundError: there is none.
        """
        return self._store.stat(confined(name)).size

    def stat(self, name: str) -> Stored:
        """A file's size and stamp.

        Raises:
            FileNotFoundError: there is none.
        """
        return self._store.stat(confined(name))

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        try:
            self._store.stat(confined(name))
        except FileNotFoundError:
            return False
        return True

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file, in place of what was there; readers see the old bytes or the new ones, nothing else."""
        self._store.write(confined(name), data)

    def upload(self, path: Path, name: str) -> None:
        """Copy a file of this machine here, without reading it into memory; as atomic as ``write``.

        Raises:
            FileNotFoundError: no file at ``path``.
        """
        self._store.upload(path, confined(name))

    def download(self, name: str, path: Path) -> None:
        """Copy a file to this machine, without reading it into memory; ``path`` is whole or as it was before.

        Raises:
            FileNotFoundError: there is no such file here.
        """
        self._store.download(confined(name), path)

    def names(self, prefix: str = "") -> Iterator[str]:
        """The names of all files below, in all its folders, that start with ``prefix``, sorted."""
        return (stored.name for stored in self.files(prefix))

    def files(self, prefix: str = "") -> Iterator[Stored]:
        """As ``names``, with each file's size and stamp: one listing instead of a question per file."""
        if prefix:
            confined(prefix.rstrip("/"))
        return self._store.files(prefix)

    def remove(self, name: str) -> None:
        """Delete a file; that there is none is no error."""
        self._store.remove(confined(name))


def confined(name: str) -> str:
    """The same name, if it stays inside its folder.

    Raises:
        UsageError: it is empty or absolute, or leaves the folder.
    """
    if not name or "\0" in name or name.startswith("/") or str(PurePosixPath(name)) != name or ".." in name.split("/"):
        raise UsageError(
            "A file's name must stay inside its folder.",
            value=name,
            rule="relative, with '/', and without '..', '.' or empty parts",
        )
    return name
