"""One file of the cache: what one encoder made of one image shard, as safetensors.

The header's metadata names the image shard by its sha256 and holds the sha256 of the data, so that a file alone says
what it belongs to and whether it is whole. Small arrays, one row per sample, come first; the values, which are
streamed while they are computed, come last. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

VALUES = "values"
"""The streamed array."""

ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8}
"""The types in use, by safetensors' names."""

_HEADER_BYTES = 4096
"""Room for the length and the header, which is filled up with spaces; its size has to be known before its contents."""

ReadRange = Callable[[int, int], bytes]
"""``(start, size)`` to the bytes there; fewer where the file ends."""


class ShardFileWriter:
    """Writes a file from front to back; it is whole when the ``with`` block ends without an error.

    Args:
        file: empty and open for writing; it has a name by which it can be read.
        tables: the small int64 arrays by name, to be filled in before the block ends.
        dtype: of the values, one of ``ITEM_BYTES``.
        row_shape: of one value row; ``()`` for a flat array.
        metadata: goes into the header.
    """

    def __init__(
        self,
        file: BinaryIO,
        *,
        tables: Mapping[str, np.ndarray],
        dtype: str,
        row_shape: Sequence[int],
        metadata: Mapping[str, str],
    ) -> None:
        self.tables = tables
        self.rows = 0
        self._dtype, self._row_shape, self._metadata = dtype, tuple(row_shape), dict(metadata)
        self._row_bytes = ITEM_BYTES[dtype] * math.prod(self._row_shape)
        self._file = file
        self._file.seek(_HEADER_BYTES + sum(table.nbytes for table in tables.values()))

    def append(self, values: bytes | memoryview) -> int:
        """Write rows; returns the number of the first one."""
        first = self.rows
        self._file.write(values)
        self.rows += len(values) // self._row_bytes if self._row_bytes else 0
        return first

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._finish()

    def _finish(self) -> None:
        self._file.seek(_HEADER_BYTES)
        entries: dict[str, object] = {}
        end = 0
        for name, table in self.tables.items():
            self._file.write(np.ascontiguousarray(table, dtype="<i8").tobytes())
            entries[name] = {"dtype": "I64", "shape": list(table.shape), "data_offsets": [end, end + table.nbytes]}
            end += table.nbytes
        last = end + self.rows * self._row_bytes
        entries[VALUES] = {"dtype": self._dtype, "shape": [self.rows, *self._row_shape], "data_offsets": [end, last]}
        self._file.flush()
        with Path(self._file.name).open("rb") as written:
            written.seek(_HEADER_BYTES)
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        header = json.dumps({"__metadata__": {**self._metadata, "sha256": digest}, **entries}).encode()
        room = _HEADER_BYTES - 8
        if len(header) > room:
            raise ValueError(f"a header of {len(header)} bytes does not fit into {room}")
        self._file.seek(0)
        self._file.write(room.to_bytes(8, "little") + header.ljust(room))


@dataclass(frozen=True)
class ShardFile:
    """What a file's header says.

    Attributes:
        metadata: as it was written, and ``sha256``.
        dtype: of the values.
        row_shape: of one value row.
        rows: value rows.
        shapes: of the small arrays.
        size: bytes of the whole file.
    """

    metadata: Mapping[str, str]
    dtype: str
    row_shape: tuple[int, ...]
    rows: int
    shapes: Mapping[str, tuple[int, ...]]
    size: int

    def span(self, first: int, count: int) -> tuple[int, int]:
        """Where value rows lie in the file: start and size in bytes.

        Raises:
            ValueError: they lie outside.
        """
        if not 0 <= first <= first + count <= self.rows:
            raise ValueError(f"rows {first} to {first + count} of {self.rows}")
        row = ITEM_BYTES[self.dtype] * math.prod(self.row_shape)
        return self.size - (self.rows - first) * row, count * row

    def tables(self, read: ReadRange) -> dict[str, np.ndarray]:
        """The small arrays.

        Raises:
            ValueError: they are not all there.
        """
        found, at = {}, _HEADER_BYTES
        for name, shape in self.shapes.items():
            found[name] = np.frombuffer(read(at, 8 * math.prod(shape)), "<i8").reshape(shape)
            at += 8 * math.prod(shape)
        return found


def read_shard_file(read: ReadRange) -> ShardFile:
    """The header; the arrays are left where they are.

    Raises:
        ValueError: not the header of a file that ``ShardFileWriter`` finished.
    """
    front = read(0, _HEADER_BYTES)
    if len(front) != _HEADER_BYTES or int.from_bytes(front[:8], "little") != _HEADER_BYTES - 8:
        raise ValueError("its header is not all there")
    try:
        header = json.loads(front[8:])
        metadata = {str(key): str(value) for key, value in header.pop("__metadata__").items()}
        values = header.pop(VALUES)
        dtype, (rows, *row_shape) = values["dtype"], values["shape"]
        shapes, at = {}, 0
        for name, entry in header.items():
            shapes[name] = tuple(int(side) for side in entry["shape"])
            end = at + 8 * math.prod(shapes[name])
            if entry["dtype"] != "I64" or entry["data_offsets"] != [at, end]:
                raise ValueError(f"its table {name} is not where it should be")
            at = end
        end = at + rows * ITEM_BYTES[dtype] * math.prod(row_shape)
        if values["data_offsets"] != [at, end]:
            raise ValueError("its values are not where they should be")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its header is not ours: {error!r}") from error
    return ShardFile(metadata, dtype, tuple(row_shape), rows, shapes, _HEADER_BYTES + end)


def data_sha256(read: ReadRange, size: int) -> str:
    """Of all that follows the header, as ``metadata["sha256"]`` has it, read in pieces."""
    digest = hashlib.sha256()
    for start in range(_HEADER_BYTES, size, 1 << 22):
        digest.update(read(start, min(1 << 22, size - start)))
    return digest.hexdigest()
