"""Reading foreign shards: as our own, but for captions in ``.txt`` and ``.cls`` and for keys of any length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from training.data.captions import sidecar_fields
from training.data.dataset import Dataset, Split
from training.data.decode import background_rgb
from training.data.disk_cache import DiskCacheConfig
from training.data.findings import RefusedError
from training.data.foreign_index import BESIDE, key_of
from training.data.index import read_index
from training.data.manifest import Manifest, SplitFacts, SplitName
from training.data.shard_files import ShardFiles
from training.data.storage import Folder
from training.data.tar_walk import walk
from training.errors import UsageError


class ForeignDataset(Dataset):
    """WebDataset shards that others made; use ``foreign.open_foreign``.

    Its manifest is made by the walk: it stands for the shards' names, sizes and headers.

    Args:
        folder: of the shards.
        manifest: what they hold.
        cache: what is kept on this machine's disk.
        home: the local folder of the indexes.
        files: reads the shards.

    Attributes:
        home: the local folder of the indexes, and of the list of what is not used.
    """

    def __init__(
        self, folder: Folder, manifest: Manifest, cache: DiskCacheConfig, home: Path, files: ShardFiles
    ) -> None:
        super().__init__(folder, manifest, cache)
        self.home = home
        self._files = files

    def verify(self) -> None:
        """There is nothing to compare the shards with.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "Shards that others made come without checksums.",
            value=self.folder.place,
            rule="a data set with a manifest",
            mend=f"darkroom data build {self.folder.place} OUT makes one of them",
        )

    def split(self, name: SplitName) -> Split:
        """One split.

        Raises:
            UsageError: there is no such split.
            DataError: its index cannot be read.
        """
        facts = self._facts(name)
        records = read_index(self.home / facts.index, facts.count)
        beside = read_index(self.home / f"{name}.beside.npy", facts.count, BESIDE)
        background = background_rgb(self.manifest.config.background)
        return ForeignSplit(self.folder.place, name, facts, records, self._files, background, beside)


class ForeignSplit(Split):
    """The samples of one split; see ``Split``.

    Args:
        place: where the data set is, for messages.
        name: the split's name.
        facts: the split's part of the manifest.
        records: the index.
        files: reads the shards.
        background: red, green, blue behind transparent pixels.
        beside: what the index has no field for.
    """

    def __init__(
        self,
        place: str,
        name: SplitName,
        facts: SplitFacts,
        records: np.ndarray,
        files: ShardFiles,
        background: tuple[int, int, int],
        beside: np.ndarray,
    ) -> None:
        super().__init__(place, name, facts, records, files, background)
        self._beside = beside

    def encoded_with_caption(self, index: int) -> tuple[memoryview, str]:
        """See ``Split``; the caption may be in any of three members."""
        return memoryview(self.encoded(index)), self.caption(index)

    def fields(self, index: int) -> dict[str, Any]:
        """See ``Split``."""
        record, beside = self.records[index], self._beside[index]
        places = ((beside, "text"), (record, "json"), (beside, "label"))
        parts = [
            self._read(index, int(row[f"{kind}_offset"]), int(row[f"{kind}_size"])) if row[f"{kind}_offset"] else None
            for row, kind in places
        ]
        try:
            return sidecar_fields(*parts)
        except RefusedError as error:
            raise self._unreadable(index, error.finding.detail) from error

    def key(self, index: int) -> str:
        """See ``Split``."""
        first, start = int(self._beside[index]["header_offset"]), int(self.records[index]["image_offset"])
        headers = self._read(index, first, start - first)
        length = len(headers) + int(self.records[index]["image_size"])
        for member in walk(lambda at, size: headers[at : at + size], length):
            return key_of(member.name)
        raise self._unreadable(index, "no header where the index says")
