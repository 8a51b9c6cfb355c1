"""Files of this machine."""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from training.data.store import Stored
from training.errors import StorageError

_ASIDE = ".partial"


class LocalStore:
    """A folder of a file system.

    Args:
        root: its path.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, name: str) -> bytes:
        """See ``Folder``."""
        with _reported(self._root / name):
            return (self._root / name).read_bytes()

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """See ``Folder``."""
        with _reported(self._root / name), (self._root / name).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), size, start)

    def stat(self, name: str) -> Stored:
        """See ``Folder``; a folder is no file."""
        path = self._root / name
        with _reported(path):
            facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise FileNotFoundError(f"{path} is no file")
        return Stored(name, facts.st_size, str(facts.st_mtime_ns))

    def write(self, name: str, data: bytes) -> None:
        """See ``Folder``."""
        with _reported(self._root / name), written(self._root / name) as file:
            file.write(data)

    def upload(self, path: Path, name: str) -> None:
        """See ``Folder``."""
        _copy(path, self._root / name)

    def download(self, name: str, path: Path) -> None:
        """See ``Folder``."""
        _copy(self._root / name, path)

    def files(self, prefix: str) -> Iterator[Stored]:
        """See ``Folder``; files that are being written are left out, links to folders are not followed."""
        top = prefix.rpartition("/")[0]
        yield from self._below(f"{top}/" if top else "", prefix)

    def _below(self, inside: str, prefix: str) -> Iterator[Stored]:
        with _reported(self._root / inside):
            try:
                # a folder sorts as its files' names do: with the slash that follows it in them
                entries = sorted(os.scandir(self._root / inside), key=lambda entry: entry.name + "/" * _is_dir(entry))
            except (FileNotFoundError, NotADirectoryError):
                return
        for entry in entries:
            name = inside + entry.name
            if _is_dir(entry):
                if f"{name}/".startswith(prefix) or prefix.startswith(f"{name}/"):
                    yield from self._below(f"{name}/", prefix)
            elif name.startswith(prefix) and not entry.name.endswith(_ASIDE):
                with suppress(FileNotFoundError):  # removed since, or a dead link
                    yield self.stat(name)

    def remove(self, name: str) -> None:
        """See ``Folder``."""
        with _reported(self._root / name):
            (self._root / name).unlink(missing_ok=True)


def _is_dir(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)


def _copy(source: Path, target: Path) -> None:
    with _reported(source):
        file = source.open("rb")
    with file, _reported(target), written(target) as copy:
        shutil.copyfileobj(file, copy, 1 << 20)


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file that is visible once it is whole and on the disk; its folder is made where it is missing.

    Raises:
        OSError: the disk is full or gone; what was there before is there still.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{uuid.uuid4().hex}{_ASIDE}")
    try:
        with aside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:
        raise FileNotFoundError(f"{path} is not there: one of its folders is a file") from error
    except OSError as error:
        raise StorageError(
            "Storage cannot be used.",
            value=str(error.filename or path),
            rule=error.strerror or str(error),
            mend="make room, or see to the folder's rights, then run the same command again",
        ) from error
