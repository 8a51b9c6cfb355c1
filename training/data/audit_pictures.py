"""Whether the index is the data set's own, and the pictures in the shards are those that it names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from training.data.audit_findings import MOST, Finding, Progress
from training.data.dataset import Dataset, Split
from training.data.manifest import SplitName, file_facts
from training.errors import DataError

_PART = 256
"""Pictures that are read together."""
_THREADS = 8
_ALTERED, _UNREADABLE = "altered", "unreadable"


def check_index(dataset: Dataset, split: SplitName) -> np.ndarray:
    """The index's ``sha256_prefix`` of every sample, mapped.

    Raises:
        DataError: the index is not the one that the manifest lists, or cannot be read.
    """
    records = dataset.split(split).records
    name = dataset.manifest.splits[split].index
    if isinstance(records, np.memmap):
        found, listed = file_facts(Path(str(records.filename))).sha256, dataset.manifest.files[name].sha256
        if found != listed:
            raise DataError(
                "The index is not the one that the data set was built with.",
                value=f"{name} with sha256 {found}",
                rule=f"sha256 {listed}, as in the manifest",
                mend="build the data set again with --force",
            )
    prefixes: np.ndarray = records["sha256_prefix"]
    return prefixes


def check_pictures(split: Split, skipped: set[int], progress: Progress) -> list[Finding]:
    """Read every picture and compare its sha256 with the index.

    Args:
        split: what was trained on.
        skipped: samples that training left out; that those are damaged is no news.
        progress: told now and then.
    """
    wrong: dict[str, list[int]] = {}
    counts = {_ALTERED: 0, _UNREADABLE: 0}
    for sample, what in _wrong(split, progress):
        if sample not in skipped:
            counts[what] += 1
            wrong.setdefault(what, [])[MOST:] = []
            wrong[what].append(sample)
    said = {
        _ALTERED: "pictures in the shards are not those that the index names, and were trained on",
        _UNREADABLE: "pictures cannot be read any more, and were trained on",
    }
    return [
        Finding("picture", 0, f"{counts[what]} {said[what]}: {', '.join(f'{split.name}[{i}]' for i in ids[:MOST])}.")
        for what, ids in wrong.items()
    ]


def _wrong(split: Split, progress: Progress) -> Iterator[tuple[int, str]]:
    prefixes = split.records["sha256_prefix"]

    def part(start: int) -> list[tuple[int, str]]:
        found = []
        for sample in range(start, min(start + _PART, len(split))):
            try:
                digest = hashlib.sha256(split.encoded(sample)).digest()
            except DataError:
                found.append((sample, _UNREADABLE))
                continue
            # 0: a data set of others, whose pictures nobody has read yet
            if prefixes[sample] and int.from_bytes(digest[:8], "big") != int(prefixes[sample]):
                found.append((sample, _ALTERED))
        return found

    starts = range(0, len(split), _PART)
    with ThreadPoolExecutor(_THREADS) as pool:
        # a few parts at a time, for a map over a billion samples would queue them all
        for first in range(0, len(starts), 4 * _THREADS):
            for start, found in zip(
                starts[first : first + 4 * _THREADS], pool.map(part, starts[first : first + 4 * _THREADS]), strict=True
            ):
                yield from found
                progress("reading pictures", min(start + _PART, len(split)), len(split))
