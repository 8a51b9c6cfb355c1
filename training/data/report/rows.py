"""Which rows of a ledger a report shows, and those rows: spread evenly by position, the same every time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from training.data.ledger import LedgerRow, open_ledger, read_tables
from training.data.manifest import SPLITS, SplitName
from training.data.storage import Folder


@dataclass(frozen=True)
class Found:
    """A row, and for a kept one the position of its sample within its split."""

    row: LedgerRow
    index: int | None


def spread(count: int, most: int) -> np.ndarray:
    """At most ``most`` of ``range(count)``, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def choose(
    dataset: Folder, counts: Mapping[str | None, int], most: Mapping[str | None, int]
) -> dict[str | None, list[int]]:
    """Numbers of inputs to show, by rule; those under None were kept.

    Args:
        dataset: its ledger's rows' numbers are their positions.
        counts: how many rows each rule has.
        most: how many to choose of each.
    """
    wanted = {rule: spread(count, most[rule]) for rule, count in counts.items()}
    chosen: dict[str | None, list[int]] = {rule: [] for rule in counts}
    seen: dict[str | None, int] = defaultdict(int)
    for table in read_tables(dataset, ["number", "rule"]):
        numbers = table["number"].to_numpy()
        for rule, places in wanted.items():
            column = table["rule"]
            here = np.flatnonzero((pc.is_null(column) if rule is None else pc.equal(column, rule)).fill_null(False))
            inside = places[(places >= seen[rule]) & (places < seen[rule] + len(here))] - seen[rule]
            chosen[rule] += numbers[here[inside]].tolist()
            seen[rule] += len(here)
    return chosen


def rows_at(dataset: Folder, numbers: Iterable[int]) -> dict[int, Found]:
    """The rows of some inputs; only the row groups that hold them are read whole."""
    wanted = np.unique(np.fromiter(numbers, np.int64))
    found: dict[int, Found] = {}
    before: dict[SplitName, int] = dict.fromkeys(SPLITS, 0)
    with open_ledger(dataset) as file:
        start = 0
        for group in range(file.num_row_groups):
            splits = file.read_row_group(group, columns=["split"])["split"]
            here = wanted[(wanted >= start) & (wanted < start + len(splits))] - start
            ordinals = {name: np.cumsum(pc.equal(splits, name).fill_null(False).to_numpy()) for name in SPLITS}
            table = file.read_row_group(group).take(pa.array(here)) if len(here) else None
            for place, values in zip(here.tolist(), table.to_pylist() if table else [], strict=True):
                row = LedgerRow(**values)
                index = before[row.split] + int(ordinals[row.split][place]) - 1 if row.kept and row.split else None
                found[row.number] = Found(row, index)
            for name in SPLITS:
                before[name] += int(ordinals[name][-1]) if len(splits) else 0
            start += len(splits)
    return found
