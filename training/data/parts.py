"""A part: all that is known about the inputs of one block once they were judged, as one Parquet file."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from training.data.ledger import SCHEMA
from training.data.storage import Folder

PART = pa.schema(
    [
        *SCHEMA,
        pa.field("digest", pa.binary(32)),
        pa.field("identity", pa.binary(32), nullable=False),
        pa.field("thumbnail", pa.binary()),
        pa.field("features", pa.list_(pa.float16())),
        pa.field("stored_digest", pa.binary(32)),
        pa.field("stored_bytes", pa.int64()),
        pa.field("stored_width", pa.int32()),
        pa.field("stored_height", pa.int32()),
        pa.field("stored_kind", pa.string()),
        pa.field("stored_direct", pa.bool_()),
        pa.field("stored_offset", pa.int64()),
    ]
)
"""The ledger's columns, and what the later stages need: the sha256 of the picture as it came, the input's part of the
source's digest, what ``clean.decide`` looks at, and what will be stored, with its place among the staged pictures."""


def part_name(block: str) -> str:
    """The file name of a block's part."""
    return f"{block}.parquet"


def pictures_name(block: str) -> str:
    """The file name of the pictures that are kept beside it."""
    return f"{block}.pictures"


def write_part(parts: Folder, block: str, rows: list[dict[str, Any]]) -> None:
    """Write the part of the block of this name, from rows by column; what a row does not say is null.

    Raises:
        StorageError: storage refuses, or does not answer.
    """
    buffer = io.BytesIO()
    columns = [pa.array([row.get(field.name) for row in rows], field.type) for field in PART]
    pq.write_table(pa.Table.from_arrays(columns, schema=PART), buffer, compression="zstd")
    parts.write(part_name(block), buffer.getvalue())


def read_part(parts: Folder, name: str, columns: list[str] | None = None) -> pa.Table:
    """A block's part.

    Raises:
        FileNotFoundError: it was not judged.
        StorageError: storage does not answer.
    """
    return pq.read_table(pa.BufferReader(parts.read(part_name(name))), columns=columns)
