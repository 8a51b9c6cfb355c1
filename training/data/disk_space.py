"""A folder of files that takes no more than it may, whichever processes write into it."""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_TO_SPARE = 0.9
"""A full folder is emptied to this part of its bound, so that it need not be listed for each new file."""
_ABANDONED_S = 3600.0
"""A file that has been written for longer than this belongs to a process that has died."""


class DiskSpace:
    """Files in the folders of one folder, of which those that were not used for longest go first.

    The room of a file is taken before its bytes are written, so that the bound holds at every moment.

    Args:
        folder: of the folders; its own file ``taken`` keeps the sum.
        limit_bytes: what all files may take, those that are being written included.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit = limit_bytes

    def write(self, path: Path, data: bytes, end: bytes) -> None:
        """Write a file aside and rename it.

        Args:
            path: of the file, in a folder of the folder; that its name was last changed or ``os.utime`` was called
                says when it was used.
            data: its bytes but the last.
            end: its last bytes.

        Raises:
            OSError: the disk is full or gone, or the file is larger than the bound.
        """
        path.parent.mkdir(exist_ok=True)
        aside = path.with_name(f".{uuid.uuid4().hex}")
        try:
            self._take(aside, len(data) + len(end))
            with aside.open("r+b") as file:
                file.write(data)
                file.write(end)
            with self._sum():  # whoever lists the folder would otherwise miss a file that is renamed meanwhile
                aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)  # what it took stays in the sum until the folder is listed again
            raise

    def _take(self, aside: Path, size: int) -> None:
        with self._sum() as file:
            known = file.read()
            taken = int(known) + size if known.isdigit() else self._limit + 1
            if taken > self._limit:
                taken = self._emptied(size) + size
            if taken > self._limit:
                raise OSError(f"{size} bytes do not fit into {self._limit}")
            _put(file, taken)
            with aside.open("xb") as empty:
                empty.truncate(size)  # so that whoever lists the folder counts it

    @contextmanager
    def _sum(self) -> Iterator[BinaryIO]:
        """The file with the sum, which nobody else has meanwhile."""
        with (self._folder / "taken").open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed, by a crash, too
            file.seek(0)
            yield file

    def _emptied(self, size: int) -> int:
        """Remove files until ``size`` fits; returns what the others really take, whatever a crash left in the sum."""
        files = self._listed()
        taken = sum(length for _, _, length, _ in files)
        if taken + size <= self._limit:
            return taken
        target = max(0, min(self._limit - size, int(self._limit * _TO_SPARE)))
        for kind, _, length, path in sorted(files):
            if taken <= target or kind == _WRITING:
                break
            with suppress(FileNotFoundError):
                path.unlink()
            taken -= length
        return taken

    def _listed(self) -> list[tuple[int, int, int, Path]]:
        now_s = time.time()
        files = []
        for inner in self._folder.iterdir():
            for entry in os.scandir(inner) if inner.is_dir() else ():
                with suppress(FileNotFoundError):  # removed or renamed since
                    facts = entry.stat()
                    kind = _WHOLE
                    if entry.name.startswith("."):
                        kind = _ABANDONED if now_s - facts.st_mtime > _ABANDONED_S else _WRITING
                    files.append((kind, facts.st_mtime_ns, facts.st_size, Path(entry.path)))
        return files


_ABANDONED, _WHOLE, _WRITING = range(3)


def _put(file: BinaryIO, number: int) -> None:
    file.seek(0)
    file.truncate()
    file.write(str(number).encode())
    file.flush()
