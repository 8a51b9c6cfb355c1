"""Which inputs of the build some samples were, found in the data set's ledger without reading all of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from training.data.dataset import Dataset
from training.data.ledger import open_ledger
from training.data.manifest import SplitName

_COLUMNS = ["source", "shard", "offset"]


def sources_of(dataset: Dataset, split: SplitName, samples: Iterable[int]) -> dict[int, str]:
    """The names of samples within the source that the data set was built from.

    Shards follow the order of the source, so that few groups of the ledger's rows hold a given shard.

    Returns:
        By sample id; nothing for a data set that was built elsewhere and has no ledger.

    Raises:
        DataError: the ledger cannot be read.
        StorageError: storage does not answer.
    """
    ids = np.array(sorted(samples), dtype=np.int64)
    if not len(ids) or dataset.manifest.ledger not in dataset.manifest.files:
        return {}
    opened = dataset.split(split)
    records = opened.records[ids]
    places = {
        (opened.shards[int(record["shard"])], int(record["image_offset"])): int(sample)
        for sample, record in zip(ids, records, strict=True)
    }
    shards = {shard for shard, _ in places}
    found: dict[int, str] = {}
    with open_ledger(dataset.folder) as file:
        for number in range(file.num_row_groups):
            if not _may_hold(file.metadata.row_group(number), shards):
                continue
            for row in file.read_row_group(number, columns=_COLUMNS).to_pylist():
                sample = places.get((row["shard"], row["offset"]))
                if sample is not None:
                    found[sample] = row["source"]
    return found


def _may_hold(group: Any, shards: set[str]) -> bool:
    """Whether one of the shards lies between the least and the greatest that a group of rows names."""
    columns = [group.column(number) for number in range(group.num_columns)]
    (of_shard,) = (column.statistics for column in columns if column.path_in_schema == "shard")
    if of_shard is None or not of_shard.has_min_max:
        return of_shard is None or of_shard.null_count < group.num_rows
    return any(of_shard.min <= shard <= of_shard.max for shard in shards)
