"""The bytes of shards: on a file system of this machine, or behind a network with blocks kept on disk."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from training.data.disk_cache import DiskCache
from training.data.findings import describe
from training.data.storage import Folder
from training.errors import StorageError

_log = logging.getLogger(__name__)
_MAX_OPEN = 256
"""Shards that are kept open; those beyond are opened for each read, for a process may open only so many."""
_PAUSES_S = (0.05, 0.2, 1.0)
"""Pauses before a read that storage refused is tried again: a failover takes a moment, a full table of files too."""
_MEND = "when the storage answers again, the same command goes on from the newest checkpoint"


class ShardFiles(Protocol):
    """Where shards are read. Threads may share it, and a forked child may use it."""

    def read(self, name: str, start: int, size: int) -> bytes:
        """``size`` bytes of a shard; fewer where it ends before.

        Raises:
            StorageError: storage answers with errors, or not.
        """


class LocalShards:
    """Shards on a file system.

    They are read by pread and not mapped: threads share no position, and a shard that shrinks under a running job is
    an error with a name instead of a SIGBUS that kills the process.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, int] = {}
        self._stale: list[int] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._files, self._stale)

    def read(self, name: str, start: int, size: int) -> bytes:
        """See ``ShardFiles``."""
        for pause_s in _PAUSES_S:
            try:
                return self._pread(name, start, size)
            except OSError as error:
                _log.warning("%s is read again: %s", name, describe(error))
                self._forget(name)  # a file handle that went stale never recovers
                time.sleep(pause_s)
        try:
            return self._pread(name, start, size)
        except OSError as error:
            rule = f"{describe(error)}, {len(_PAUSES_S) + 1} times"
            place = str(self._folder / name)
            raise StorageError("A shard cannot be read.", value=place, rule=rule, mend=_MEND) from error

    def _pread(self, name: str, start: int, size: int) -> bytes:
        with self._lock:
            kept = self._files.get(name)
            if kept is None and len(self._files) < _MAX_OPEN:
                kept = self._files[name] = os.open(self._folder / name, os.O_RDONLY)
        if kept is not None:
            return os.pread(kept, size, start)
        with (self._folder / name).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), size, start)

    def _forget(self, name: str) -> None:
        """Open the shard anew at its next read; other threads may still read from the old descriptor."""
        with self._lock:
            kept = self._files.pop(name, None)
            if kept is not None:
                self._stale.append(kept)


def _close_all(files: dict[str, int], stale: list[int]) -> None:
    for descriptor in (*files.values(), *stale):
        os.close(descriptor)


class RemoteShards:
    """Shards behind a network.

    Args:
        folder: where they lie.
        cache: where their blocks are kept.
        versions: of each shard its size in bytes and what names its content.
    """

    def __init__(self, folder: Folder, cache: DiskCache, versions: Mapping[str, tuple[int, str]]) -> None:
        self._folder = folder
        self._cache = cache
        self._versions = versions

    def read(self, name: str, start: int, size: int) -> bytes:
        """See ``ShardFiles``."""
        length, version = self._versions[name]
        try:
            return self._cache.read(self._folder, name, version, length, start, size)
        except FileNotFoundError as error:  # it was there when the data set was opened
            place = self._folder.url(name)
            raise StorageError("A shard cannot be read.", value=place, rule="not there any more", mend=_MEND) from error
