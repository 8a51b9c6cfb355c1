"""The image shards of a split, and which samples lie in which."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from training.data.dataset import Split
from training.data.manifest import FileFacts


@dataclass(frozen=True)
class ImageShard:
    """One image shard.

    Attributes:
        name: of its file.
        sha256: of its bytes, hexadecimal.
        first: the id of its first sample.
        count: samples in it; their ids follow one another.
    """

    name: str
    sha256: str
    first: int
    count: int

    @property
    def samples(self) -> range:
        """The ids of its samples."""
        return range(self.first, self.first + self.count)


class ImageShards:
    """The shards of a split by number; found in the index by bisection, so that no list of samples is made.

    Args:
        split: whose shards.
        files: the manifest's, with their checksums.
    """

    def __init__(self, split: Split, files: Mapping[str, FileFacts]) -> None:
        self._split, self._files = split, files
        self._numbers = np.asarray(split.records)["shard"]  # still mapped, and quicker to look things up in
        self._known: dict[int, ImageShard] = {}

    def __len__(self) -> int:
        return len(self._split.shards)

    def __getitem__(self, number: int) -> ImageShard:
        known = self._known.get(number)
        if known is None:
            name = self._split.shards[number]
            first, end = self._begin(number), self._begin(number + 1)
            known = self._known[number] = ImageShard(name, self._files[name].sha256, first, end - first)
        return known

    def locate(self, sample_id: int) -> tuple[int, int]:
        """The number of the shard that a sample lies in, and its row there.

        Raises:
            IndexError: there is no such sample.
        """
        number = int(self._numbers[sample_id])
        return number, sample_id - self[number].first

    def _begin(self, number: int) -> int:
        return bisect_left(range(len(self._numbers)), number, key=lambda row: int(self._numbers[row]))
