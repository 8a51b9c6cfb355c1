"""Files and folders that are on the disk when a call returns. Every call to the system is one of ``os``."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from training.errors import StorageError

_CHUNK = 8 << 20


@contextmanager
def reported(path: Path | str) -> Iterator[None]:
    """Says what storage refuses.

    Raises:
        StorageError: in place of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            "The checkpoint cannot be written.",
            value=str(error.filename or path),
            rule=error.strerror or str(error),
            mend="make room, or mend the storage; the same command goes on from the newest checkpoint",
        ) from error


def write(path: Path, pieces: Iterable[bytes | memoryview]) -> tuple[str, int]:
    """Write a file that must not exist yet; returns its sha256 and size.

    Other threads go on meanwhile: hashing and writing large pieces let go of the interpreter.
    """
    digest, size = hashlib.sha256(), 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for piece in pieces:
            whole = memoryview(piece)
            for start in range(0, len(whole), _CHUNK):
                part = whole[start : start + _CHUNK]
                digest.update(part)
                size += len(part)
                while part:
                    part = part[os.write(handle, part) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    return digest.hexdigest(), size


def flush_folder(path: Path) -> None:
    """The names in a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """The folder is there, and the names that lead to it are on the disk."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with suppress(FileExistsError):  # another rank was faster
        path.mkdir()
    flush_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Without its name first, so that what a crash leaves of it is seen to be no checkpoint."""
    aside = path if path.name.startswith("partial-") else path.with_name(f"partial-removed-{path.name}")
    if aside != path:
        path.rename(aside)
    shutil.rmtree(aside)
