"""One state in shared memory: a header that says whether it is whole, and the values.

A process that is killed has made its earlier stores and none of its later ones, so the header is invalidated before
the first value changes and made valid after the last: a valid header means whole values. The header's own bytes have
a checksum, because the kill may come between two of them. The values have none: they lie in the same memory as the
weights that are being trained, and are lost with the machine as those are.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.checkpoint.layout import Layout
from training.checkpoint.slab import Slab
from training.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_HEADER = 1 << 20
_FIXED = struct.Struct("<8sIII")
_MAGIC = b"darkroom"


class Slot:
    """A file of shared memory with room for one state. Use ``create`` or ``open``.

    Attributes:
        slab: the values.
        step: of the state; None where it is not whole.
        told: what was committed with it.
    """

    def __init__(self, path: Path, handle: int, layout: Layout) -> None:
        self._map = mmap.mmap(handle, _HEADER + layout.size)
        self.path = path
        self.slab = Slab(layout, memoryview(self._map)[_HEADER:])
        self.step: int | None = None
        self.told: Mapping[str, Any] = {}

    @classmethod
    def create(cls, path: Path, layout: Layout) -> Slot:
        """Take the memory, all of it at once, so that no later store finds none.

        Raises:
            OSError: there is not so much.
        """
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(handle, 0, _HEADER + layout.size)
            return cls(path, handle, layout)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)

    @classmethod
    def open(cls, path: Path, layout: Layout) -> Slot | None:
        """What an earlier process has left; None where it is of another size."""
        try:
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            if os.fstat(handle).st_size != _HEADER + layout.size:
                return None
            slot = cls(path, handle, layout)
        finally:
            os.close(handle)
        slot._read()
        return slot

    def put(self, values: Sequence[torch.Tensor], scalars: Mapping[str, float]) -> None:
        """Copy a state in; it is whole once it is committed."""
        self.invalidate()
        self.slab.fill(values, scalars)

    def invalidate(self) -> None:
        """Hold no state."""
        self._map[: _FIXED.size] = bytes(_FIXED.size)
        self.step = None

    def commit(self, step: int, told: Mapping[str, Any]) -> None:
        """From now on it is the state after ``step``.

        Raises:
            CheckpointError: what is told with it is too long.
        """
        text = json.dumps({"step": step, "scalars": dict(self.slab.scalars), "told": dict(told)}).encode()
        if len(text) > _HEADER - _FIXED.size:
            raise CheckpointError(
                "What goes with a state is too long.", value=f"{len(text)} bytes", rule=f"{_HEADER} bytes"
            )
        self._map[_FIXED.size : _FIXED.size + len(text)] = text
        self._map[: _FIXED.size] = _FIXED.pack(_MAGIC, 1, len(text), zlib.crc32(text))
        self.step, self.told = step, told

    def _read(self) -> None:
        magic, version, length, check = _FIXED.unpack(self._map[: _FIXED.size])
        text = self._map[_FIXED.size : _FIXED.size + min(length, _HEADER)]
        if (magic, version, check) != (_MAGIC, 1, zlib.crc32(text)):
            return
        known = json.loads(text)
        self.step, self.slab.scalars, self.told = int(known["step"]), known["scalars"], known["told"]
