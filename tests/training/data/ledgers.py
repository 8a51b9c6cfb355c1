"""The ledger of a data set by row, which is how tests look at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from training.data.ledger import LedgerRow, read_tables
from training.data.storage import Folder


def read_ledger(dataset: Path | Folder) -> Iterator[LedgerRow]:
    """Every row, in the order of the source."""
    for table in read_tables(dataset):
        for row in table.to_pylist():
            yield LedgerRow(**row)
