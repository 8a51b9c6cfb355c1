"""Parquet manifests, a row group at a time, and the pictures that they hold as the Hugging Face Hub stores them."""

from __future__ import annotations

import io
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from datetime import date, datetime, time
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from training.data.captions import Fields
from training.data.findings import describe
from training.data.rows import Cell, unreadable

_BATCH_ROWS = 1024
_PICTURE_ROWS = 16
"""Pictures that are decoded from a column at a time."""
_KEPT_ROWS, _KEPT_BYTES = 256, 128_000_000
"""Pictures of a row group that stay in memory for threads that are a little behind: the latest ones."""
_BUFFER_BYTES = 1 << 20
"""Of a column that is read through, instead of the whole of it in memory."""

_DAMAGE = (pa.ArrowException, OSError, ValueError)
_PICTURES = frozenset({"image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes", "data", "content"})
"""Binary columns that are pictures by their name; a struct with ``bytes`` and ``path`` is one by its type."""


def parquet_rows(name: str, file: BinaryIO) -> Iterator[tuple[int, Fields | ValueError, Cell | None]]:
    """Each row's number from 1, its fields, and where its picture's bytes are, if the file holds them.

    Binary columns are no fields. A row group that cannot be read is one bad row.

    Raises:
        DataError: it is no Parquet file.
    """
    parquet = open_parquet(name, file)
    schema, number = parquet.schema_arrow, 0
    picture = picture_column(schema)
    size = file.seek(0, io.SEEK_END)
    for group in range(parquet.num_row_groups):
        first, count = number + 1, parquet.metadata.row_group(group).num_rows
        try:
            if count > size:
                raise ValueError(f"{count} rows in a file of {size} bytes")
            leaf = picture if picture and _holds_bytes(parquet, group, picture) else ""
            columns = _columns(schema, picture, with_path=not leaf)
            for row, fields in enumerate(_fields(parquet, group, count, columns)):
                cell = Cell(group, row, leaf) if leaf else None
                number += 1
                yield number, fields, cell
        except _DAMAGE as error:
            yield number + 1, ValueError(f"rows {number + 1} to {first + count - 1}: {describe(error)}"), None
        number = first + count - 1


def open_parquet(name: str, file: BinaryIO) -> pq.ParquetFile:
    """A Parquet file whose columns are read piece by piece.

    Raises:
        DataError: it is none.
    """
    try:
        parquet = pq.ParquetFile(pa.PythonFile(file, "r"), pre_buffer=False, buffer_size=_BUFFER_BYTES)
        picture_column(parquet.schema_arrow)  # damaged names of columns show when they are asked for
    except _DAMAGE as error:
        raise unreadable(name, f"a Parquet file: {describe(error)}", "write it anew") from error
    return parquet


def picture_column(schema: pa.Schema) -> str:
    """The column that holds pictures, as a Parquet path, ``image.bytes`` for instance; ``""`` if none does."""
    for field in schema:
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            if _is_binary(field.type.field("bytes").type):
                return f"{field.name}.bytes"
        elif _is_binary(field.type) and field.name.lower() in _PICTURES:
            return str(field.name)
    return ""


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _holds_bytes(parquet: pq.ParquetFile, group: int, column: str) -> bool:
    """Whether a row group has any bytes there: a Hub data set may name its files instead, and leave them null."""
    facts = parquet.metadata.row_group(group)
    for number in range(facts.num_columns):
        chunk = facts.column(number)
        if chunk.path_in_schema == column:
            known = chunk.statistics
            return known is None or not known.has_null_count or known.null_count < facts.num_rows
    return True


def _columns(schema: pa.Schema, picture: str, *, with_path: bool) -> list[str]:
    """All columns but binary ones; of the pictures' own at most their path."""
    holder = picture.partition(".")[0]
    names = [field.name for field in schema if field.name != holder and not _is_binary(field.type)]
    nested = with_path and holder != picture and schema.field(holder).type.get_field_index("path") >= 0
    return [*names, f"{holder}.path"] if nested else names


def _fields(parquet: pq.ParquetFile, group: int, count: int, columns: list[str]) -> Iterator[Fields]:
    if not columns:
        yield from ({} for _ in range(count))
        return
    paths = {name.rpartition(".")[0] for name in columns if name not in parquet.schema_arrow.names}
    for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False):
        for row in batch.to_pylist():
            fields = {key: _plain(value) for key, value in row.items() if value is not None}
            for holder in paths & fields.keys():
                path = fields.pop(holder).get("path")
                fields.update({"file_name": path} if path and "file_name" not in fields else {})
            yield fields


def _plain(value: Any) -> Any:
    """A value as JSON can say it: what is no number is null, moments are ISO 8601, other kinds are their text."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items() if not isinstance(inner, bytes)}
    if isinstance(value, list):
        return [_plain(inner) for inner in value if not isinstance(inner, bytes)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    return value if value is None or isinstance(value, str | int | bool) else str(value)


class PictureColumn:
    """The pictures of one row group, read through in order: the group need not fit into memory.

    Rows are asked for from several threads, nearly in order; one that has gone by starts the reading anew.

    Args:
        parquet: the file.
        group: the row group.
        column: as ``picture_column`` names it.
    """

    def __init__(self, parquet: pq.ParquetFile, group: int, column: str) -> None:
        self._parquet, self._group, self._column = parquet, group, column
        self._lock = threading.Lock()
        self._restart()

    def _restart(self) -> None:
        self._kept: OrderedDict[int, bytes | None] = OrderedDict()
        self._bytes = 0
        self._next = 0
        self._batches = self._parquet.iter_batches(
            _PICTURE_ROWS, row_groups=[self._group], columns=[self._column], use_threads=False
        )

    def read(self, row: int) -> bytes | None:
        """The bytes of one row, None where they are null.

        Raises:
            OSError: the file is damaged there, or holds no such row.
        """
        with self._lock:
            try:
                if row < self._next and row not in self._kept:
                    self._restart()
                while row >= self._next:
                    self._advance()
            except (*_DAMAGE, StopIteration) as error:
                self._restart()
                raise OSError(describe(error)) from error
            return self._kept[row]

    def _advance(self) -> None:
        values = next(self._batches).column(0)
        if pa.types.is_struct(values.type):
            values = values.field(0)
        for value in values:
            self._kept[self._next] = picture = value.as_py()
            self._bytes += len(picture or b"")
            self._next += 1
        while len(self._kept) > max(3 * _PICTURE_ROWS, _KEPT_ROWS if self._bytes <= _KEPT_BYTES else 0):
            self._bytes -= len(self._kept.popitem(last=False)[1] or b"")
