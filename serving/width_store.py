"""The widths that were measured, kept in files: every process that serves the same weights takes the same ones."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path


class WidthStore:
    """A folder with one small file for each size; the first one to write it has decided.

    Args:
        folder: made if need be.
        key: what makes a measurement another one: the weights, the device, the libraries.
    """

    def __init__(self, folder: Path, *key: str) -> None:
        self.folder = folder / hashlib.sha256("\x00".join(key).encode()).hexdigest()[:16]

    def width(self, size: Sequence[int]) -> int | None:
        """What was kept; None where nothing readable is."""
        try:
            width = int(self._file(size).read_text())
        except (OSError, ValueError):
            return None
        return width if width > 0 else None

    def keep(self, size: Sequence[int], width: int) -> int:
        """Keep a width unless another process was faster; return the one that holds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=self.folder)
        with os.fdopen(handle, "w") as file:
            file.write(str(width))
        with contextlib.suppress(FileExistsError):
            os.link(aside, self._file(size))  # whole or not at all, and never over another's
        Path(aside).unlink()
        return self.width(size) or width

    def _file(self, size: Sequence[int]) -> Path:
        return self.folder / "x".join(str(side) for side in size)
