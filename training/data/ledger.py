"""The ledger: one Parquet row per input of a build, kept or dropped and why."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from training.data.findings import describe
from training.data.manifest import SplitName, read_manifest
from training.data.storage import Folder
from training.errors import DataError

LEDGER = "ledger.parquet"

FORGOTTEN = "forgotten"
"""The rule of a row whose sample ``darkroom data forget`` took out."""

SCHEMA = pa.schema(
    [
        pa.field("number", pa.int64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("rule", pa.string()),
        pa.field("value", pa.float64()),
        pa.field("threshold", pa.float64()),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("of", pa.int64()),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("phash", pa.uint64()),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("licence", pa.string(), nullable=False),
        pa.field("creator", pa.string(), nullable=False),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("sharpness", pa.float32()),
        pa.field("spread", pa.float32()),
        pa.field("unsafe", pa.float32()),
        pa.field("outlier", pa.float32()),
        pa.field("caption_match", pa.float32()),
        pa.field("split", pa.string()),
        pa.field("key", pa.string()),
        pa.field("shard", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("fields", pa.string(), nullable=False),
    ]
)
"""One column per attribute of ``LedgerRow``, in the same order."""

_GROUP_ROWS = 16_384
"""Rows that are held at once: about 10 MB with the captions and fields of a web picture."""


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """What became of one input.

    Attributes:
        number: position in the source, from 0.
        source: the input's name within the source.
        kept: whether it is in a shard.
        rule: the rule that dropped it.
        value: what the rule found.
        threshold: what the rule would have accepted.
        detail: the reason in words.
        of: the number of the input that is kept instead, where it was dropped as a duplicate.
        sha256: of the encoded picture as it was read, hexadecimal; ``""`` where it was not read.
        phash: the perceptual hash.
        bytes: the encoded picture's size as it was read.
        width: pixels, once it is upright; of one that was dropped before it was decoded, as its header says.
        height: likewise.
        kind: the file ending of its format; ``""`` where its header was not read.
        caption: after cleaning.
        licence: as stated beside the picture.
        creator: as stated beside the picture.
        domain: where the picture came from.
        url: where the picture came from.
        sharpness: as ``blurred`` measures it.
        spread: as ``uniform`` measures it.
        unsafe: the score of the unsafe-picture model.
        outlier: the distance from the other pictures.
        caption_match: the similarity of caption and picture.
        split: ``train`` or ``held_out``.
        key: the sample's WebDataset key.
        shard: the shard's file name.
        offset: of the picture's bytes within the shard.
        fields: all that is known about it, a JSON object.
    """

    number: int
    source: str
    kept: bool
    rule: str | None = None
    value: float | None = None
    threshold: float | None = None
    detail: str = ""
    of: int | None = None
    sha256: str = ""
    phash: int | None = None
    bytes: int = 0
    width: int | None = None
    height: int | None = None
    kind: str = ""
    caption: str = ""
    licence: str = ""
    creator: str = ""
    domain: str = ""
    url: str = ""
    sharpness: float | None = None
    spread: float | None = None
    unsafe: float | None = None
    outlier: float | None = None
    caption_match: float | None = None
    split: SplitName | None = None
    key: str | None = None
    shard: str | None = None
    offset: int | None = None
    fields: str = "{}"

    def as_dict(self) -> dict[str, Any]:
        """The row by column."""
        return {name: getattr(self, name) for name in SCHEMA.names}


class LedgerWriter:
    """Writes a ledger row by row; equal rows give equal bytes, however they were grouped when they came.

    Args:
        path: the file to write.

    Raises:
        OSError: the disk is full or gone.
    """

    def __init__(self, path: Path) -> None:
        self.count = 0
        self._waiting: list[pa.Table] = []
        self._rows = 0
        self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd")

    def add(self, rows: Iterable[LedgerRow]) -> None:
        """Append rows, in the order of the source."""
        self.add_table(pa.Table.from_pylist([row.as_dict() for row in rows], schema=SCHEMA))

    def add_rows(self, rows: list[dict[str, Any]]) -> None:
        """Append rows that are by column already."""
        self.add_table(pa.Table.from_pylist(rows, schema=SCHEMA))

    def add_table(self, rows: pa.Table) -> None:
        """Append rows that are columns already."""
        self._waiting.append(rows.cast(SCHEMA))
        self._rows += rows.num_rows
        self.count += rows.num_rows
        while self._rows >= _GROUP_ROWS:
            self._flush(_GROUP_ROWS)

    def _flush(self, count: int) -> None:
        table = pa.concat_tables(self._waiting).combine_chunks()
        self._writer.write_table(table.slice(0, count), row_group_size=_GROUP_ROWS)
        self._waiting = [table.slice(count)]
        self._rows -= count

    def __enter__(self) -> LedgerWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None and self._rows:
            self._flush(self._rows)
        self._writer.close()


@contextmanager
def open_ledger(dataset: Path | Folder) -> Iterator[pq.ParquetFile]:
    """The ledger's Parquet file, on whatever storage the data set lies.

    Raises:
        DataError: no data set there, or a ledger that cannot be read.
        StorageError: storage does not answer.
    """
    folder = dataset if isinstance(dataset, Folder) else Folder.at(dataset)
    name = read_manifest(folder).ledger
    try:
        with pq.ParquetFile(folder.local / name if folder.local else _Ranged(folder, name)) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            "The data set's ledger cannot be read.", value=folder.url(name), rule=describe(error)
        ) from error


def read_tables(dataset: Path | Folder, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The ledger of a data set as columns, in the order of its source; one row group is in memory at a time.

    Args:
        dataset: a finished data set.
        columns: those that are read; all if None.

    Raises:
        DataError: no data set there, or a ledger that cannot be read.
        StorageError: storage does not answer.
    """
    with open_ledger(dataset) as file:
        for number in range(file.num_row_groups):
            yield file.read_row_group(number, columns=columns)


class _Ranged(io.RawIOBase):
    """A file of a folder on any storage, read by ranges."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name, self._size, self._at = folder, name, folder.size(name), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        data = self._folder.read_range(self._name, self._at, left if size < 0 else min(size, left))
        self._at += len(data)
        return data
