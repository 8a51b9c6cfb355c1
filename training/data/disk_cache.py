"""Blocks of remote files kept on the disk of a node: bounded, shared by its processes, the longest unused go first."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from training.data.disk_space import DiskSpace
from training.data.storage import Folder
from training.errors import DataError, StorageError

_log = logging.getLogger(__name__)
_STRIPES = 256
"""Locks on fetching: one of so many per block, so that a block is fetched once by however many processes want it."""
_CRC_BYTES = 4
_KNOWN = 1 << 17
"""Blocks whose checksum a process remembers to have compared."""
_UNUSED_S = 30 * 86_400.0
"""An index that nobody has opened for so long is removed."""
_AHEAD = 2
"""Blocks that are fetched before they are asked for, at once."""


def user_cache() -> Path:
    """The user's folder for what can be had again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "darkroom"


class DiskCacheConfig(BaseModel):
    """What is kept on a node's own disk of a data set that lies behind a network."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str = ""
    """On a disk of each node, shared by its processes; ``darkroom`` in the user's cache folder if empty."""
    size_mb: int = Field(default=20_000, ge=0)
    """Megabytes (10**6 bytes) for blocks of shards in this folder; 0 keeps none and asks the storage for each sample.
    Indexes lie beside them and are not counted: each is needed whole as long as anybody reads its data set; one that
    nobody has opened for a month is removed."""
    block_mb: int = Field(default=4, ge=1, le=256)
    """Megabytes that one request fetches: neighbours of a sample come with it."""

    def open(self) -> DiskCache:
        """The cache.

        Raises:
            StorageError: its folder cannot be made.
        """
        folder = Path(self.folder).expanduser().absolute() if self.folder else user_cache()
        return DiskCache(folder, self.size_mb * 1_000_000, self.block_mb * 1_000_000)


class DiskCache:
    """Ranged reads of remote files through blocks on disk.

    A block is written aside and renamed, and its length and checksum are compared when a process first reads it, so
    that what a crash left half-written is fetched again and never believed. Threads may share a cache, processes may
    share its folder, and a forked child may use its parent's.

    Args:
        folder: where blocks and indexes lie.
        size_bytes: what blocks may take, those being written included; 0 keeps none.
        block_bytes: what one request fetches.

    Raises:
        StorageError: the folder cannot be made.
    """

    def __init__(self, folder: Path, size_bytes: int, block_bytes: int) -> None:
        self.folder = folder
        self._block_bytes = block_bytes
        self._keeps = size_bytes >= block_bytes + _CRC_BYTES
        self._known: dict[Path, int] = {}
        self._last: dict[str, int] = {}
        self._ahead = os.getpid(), threading.BoundedSemaphore(_AHEAD)
        try:
            for name in ("blocks", "locks", "indexes"):
                (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                "The cache for remote data cannot be made.",
                value=str(folder),
                rule=error.strerror,
                mend="name another with --set data.disk_cache.folder=FOLDER",
            ) from error
        self._space = DiskSpace(folder / "blocks", size_bytes)

    def read(self, source: Folder, name: str, version: str, length: int, start: int, size: int) -> bytes:
        """``size`` bytes of a remote file; fewer where it ends before.

        Args:
            source: where the file lies.
            name: of the file.
            version: names its content: another one after it was written anew.
            length: bytes of the whole file.
            start: of the range.
            size: of the range.

        Raises:
            FileNotFoundError: there is no such file.
            StorageError: storage does not answer.
        """
        end = min(start + size, length)
        if start >= end:
            return b""
        if not self._keeps:
            return source.read_range(name, start, end - start)
        whole = _File(source, name, length, hashlib.sha256(f"{source.place}\n{name}\n{version}".encode()).hexdigest())
        first, last = start // self._block_bytes, (end - 1) // self._block_bytes
        parts = []
        for number in range(first, last + 1):
            begin = number * self._block_bytes
            parts.append(self._part(whole, number, max(start - begin, 0), min(end - begin, self._block_bytes)))
        self._read_ahead(whole, first, last)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _part(self, whole: _File, number: int, start: int, end: int) -> bytes:
        path = self._path(whole, number)
        kept = self._kept(path, self._length(whole, number), start, end)
        return self._fetched(whole, number)[start:end] if kept is None else kept

    def _path(self, whole: _File, number: int) -> Path:
        return self.folder / "blocks" / whole.digest[:2] / f"{whole.digest[2:34]}-{self._block_bytes}-{number}"

    def _length(self, whole: _File, number: int) -> int:
        return min(self._block_bytes, whole.length - number * self._block_bytes)

    def _kept(self, path: Path, length: int, start: int, end: int) -> bytes | None:
        """A part of a block on disk, or None. No block stays open: one that is removed must free its room at once."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return None
        try:
            facts = os.fstat(descriptor)
            if facts.st_size != length + _CRC_BYTES:
                return None
            os.utime(descriptor)
            if self._known.get(path) == facts.st_ino:
                return os.pread(descriptor, end - start, start)
            data = os.pread(descriptor, facts.st_size, 0)
        except OSError as error:
            _log.warning("A block of the cache is fetched again: %s: %s", path, error)
            return None
        finally:
            os.close(descriptor)
        if zlib.crc32(data[:length]).to_bytes(_CRC_BYTES, "little") != data[length:]:
            _log.warning("A block of the cache is damaged and fetched again: %s", path)
            return None
        self._remember(path, facts.st_ino)
        return data[start:end]

    def _remember(self, path: Path, inode: int) -> None:
        if len(self._known) >= _KNOWN:
            self._known.clear()
        self._known[path] = inode

    def _fetched(self, whole: _File, number: int) -> bytes:
        """A whole block from the storage, kept on the way; or from the disk, if another process was faster."""
        path, length = self._path(whole, number), self._length(whole, number)
        with self._only_one(path):
            kept = self._kept(path, length, 0, length)
            if kept is not None:
                return kept
            data = whole.source.read_range(whole.name, number * self._block_bytes, length)
            if len(data) == length:  # the file was cut short: the caller notices, and the block is not kept
                self._keep(path, data)
            return data

    def _keep(self, path: Path, data: bytes) -> None:
        try:
            self._space.write(path, data, zlib.crc32(data).to_bytes(_CRC_BYTES, "little"))
        except OSError as error:  # a full disk makes reading slower, and nothing else
            _log.warning("A block could not be kept in the cache: %s: %s", path, error)

    @contextmanager
    def _only_one(self, path: Path) -> Iterator[None]:
        stripe = zlib.crc32(str(path).encode()) % _STRIPES
        with (self.folder / "locks" / f"{stripe:03d}").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed, by a crash, too
            yield

    def _read_ahead(self, whole: _File, first: int, last: int) -> None:
        """Where somebody reads on from block to block, the next one is fetched while this one is used."""
        before = self._last.get(whole.digest)
        self._last[whole.digest] = last
        following = last + 1
        goes_on = before is not None and before in {first - 1, first} and last > before
        if not goes_on or following * self._block_bytes >= whole.length or self._path(whole, following).exists():
            return
        if self._ahead[0] != os.getpid():  # a forked child has none of its parent's threads
            self._ahead = os.getpid(), threading.BoundedSemaphore(_AHEAD)
        free = self._ahead[1]
        if free.acquire(blocking=False):
            threading.Thread(target=self._fetch_ahead, args=(whole, following, free), daemon=True).start()

    def _fetch_ahead(self, whole: _File, number: int, free: threading.Semaphore) -> None:
        try:
            self._fetched(whole, number)
        except (OSError, StorageError) as error:  # whoever needs the block meets the error again
            _log.debug("read ahead of %s: %s", whole.name, error)
        finally:
            free.release()

    def whole(self, source: Folder, name: str, sha256: str, size: int) -> Path:
        """A whole remote file on this machine's disk, fetched if it is not there, and compared with its checksum.

        Raises:
            DataError: it is missing, or is not what the checksum names.
            StorageError: storage does not answer, or the disk is full.
        """
        path = self.folder / "indexes" / f"{sha256}-{name.rpartition('/')[2]}"
        with self._only_one(path):
            if path.is_file() and path.stat().st_size == size:
                os.utime(path)
                return path
            aside = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
            try:
                source.download(name, aside)
                with aside.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != sha256:
                    raise DataError("A file is damaged.", value=source.url(name), rule=f"sha256 {sha256}, not {found}")
                self._drop_unused()
                aside.replace(path)
            except FileNotFoundError as error:
                raise DataError(
                    "A file is missing.", value=source.url(name), rule="as the manifest lists it"
                ) from error
            finally:
                aside.unlink(missing_ok=True)
        return path

    def _drop_unused(self) -> None:
        now_s = time.time()
        for kept in (self.folder / "indexes").iterdir():
            with suppress(FileNotFoundError):
                if now_s - kept.stat().st_mtime > _UNUSED_S:
                    kept.unlink()  # whoever has it mapped reads on


class _File:
    """A version of a remote file."""

    __slots__ = ("digest", "length", "name", "source")

    def __init__(self, source: Folder, name: str, length: int, digest: str) -> None:
        self.source, self.name, self.length, self.digest = source, name, length, digest
