"""A finished data set, read by index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from training.data.batch import Sample
from training.data.captions import parse_object
from training.data.decode import background_rgb, decode
from training.data.disk_cache import DiskCacheConfig
from training.data.findings import describe
from training.data.index import read_index
from training.data.manifest import MANIFEST, SPLITS, Manifest, SplitFacts, SplitName, check_files, read_manifest
from training.data.shard_files import LocalShards, RemoteShards, ShardFiles
from training.data.storage import Folder
from training.errors import DarkroomError, DataError, UsageError

_BESIDE = 1024
"""Two members this close are side by side: the first is padded to a whole block, and a header follows."""


def is_dataset(place: str | Path) -> bool:
    """Whether ``Dataset.open`` finds a data set there, sound or not.

    Raises:
        StorageError: storage refuses or does not answer.
    """
    from training.data.foreign import are_shards

    folder = Folder.at(place)
    return folder.exists(MANIFEST) or are_shards(folder)


class Dataset:
    """A data set that ``darkroom data build`` made, or shards that others made; use ``Dataset.open``.

    Attributes:
        path: its folder; a URL as text where it lies behind a network.
        folder: the same, as storage.
        manifest: what it holds.
    """

    def __init__(self, place: str | Path | Folder, manifest: Manifest, cache: DiskCacheConfig | None = None) -> None:
        self.folder = place if isinstance(place, Folder) else Folder.at(place)
        self.path: Path | str = self.folder.local or self.folder.place
        self.manifest = manifest
        self._cache = cache or DiskCacheConfig()

    @classmethod
    def open(cls, place: str | Path, cache: DiskCacheConfig | None = None) -> Dataset:
        """Read the manifest and compare the files' sizes with it; reads no picture.

        Args:
            place: a folder or a URL of one, with a manifest; or with tars of WebDataset that others made, which are
                indexed first (see ``foreign``).
            cache: what is kept on this machine's disk of a data set behind a network; the defaults where None.

        Raises:
            DataError: no data set there, or a damaged one.
            StorageError: storage refuses or does not answer.
        """
        folder = Folder.at(place)
        if not folder.exists(MANIFEST):
            from training.data.foreign import are_shards, open_foreign

            if are_shards(folder):
                return open_foreign(place, cache=cache)
        manifest = read_manifest(folder)
        check_files(folder, manifest)
        return cls(folder, manifest, cache)

    @property
    def hash(self) -> str:
        """Names the data set: 64 hexadecimal digits."""
        return self.manifest.hash

    def verify(self) -> None:
        """Read every file and compare its checksum with the manifest.

        Raises:
            DataError: naming the files that are missing or differ.
            StorageError: storage refuses or does not answer.
        """
        check_files(self.folder, self.manifest, checksums=True)

    def split(self, name: SplitName) -> Split:
        """One split.

        Raises:
            UsageError: there is no such split.
            DataError: its index cannot be read.
        """
        facts, files = self._facts(name), self.manifest.files
        background = background_rgb(self.manifest.config.background)
        if self.folder.local is not None:
            index = read_index(self.folder.local / facts.index, facts.count)
            return Split(self.folder.place, name, facts, index, LocalShards(self.folder.local), background)
        cache = self._cache.open()
        listed = files[facts.index]
        index = read_index(cache.whole(self.folder, facts.index, listed.sha256, listed.size_bytes), facts.count)
        versions = {shard: (files[shard].size_bytes, files[shard].sha256) for shard in facts.shards}
        return Split(self.folder.place, name, facts, index, RemoteShards(self.folder, cache, versions), background)

    def _facts(self, name: SplitName) -> SplitFacts:
        if name not in SPLITS:
            raise UsageError("There is no such split.", value=name, rule="a split of the data set", options=SPLITS)
        return self.manifest.splits[name]


class Split:
    """The samples of one split. Threads may share it.

    What is wrong with a sample itself is a ``DataError``, which every process meets alike. That storage does not
    answer is a ``StorageError``, which only this process may have met: whoever leaves samples out must not go by it.

    Args:
        place: where the data set is, for messages.
        name: the split's name.
        facts: the split's part of the manifest.
        records: the index.
        files: reads the shards.
        background: red, green, blue behind transparent pixels.

    Attributes:
        records: the index, one record of ``index.DTYPE`` per sample; mapped and not in memory.
        shards: the shards' file names, in the order of the index's shard numbers.
    """

    def __init__(
        self,
        place: str,
        name: SplitName,
        facts: SplitFacts,
        records: np.ndarray,
        files: ShardFiles,
        background: tuple[int, int, int],
    ) -> None:
        self.name = name
        self.background = background
        self.records = records
        self._plain_records = np.asarray(records)  # mapped as well, and much quicker to take a record from
        self._place = place
        self.shards = facts.shards
        self._files = files

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """One sample, its picture decoded at its own size.

        Raises:
            DataError: the sample is damaged.
            StorageError: storage answers with errors.
            IndexError: there is no such sample.
        """
        index = range(len(self))[index]
        picture, metadata = self.picture(index)
        return Sample(index, self.key(index), np.array(picture), str(metadata["caption"]), metadata)

    def picture(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        """The decoded RGB picture at its own size, and its fields.

        Raises:
            DataError: the sample is damaged.
            StorageError: storage answers with errors.
            IndexError: there is no such sample.
        """
        data = self.encoded(index)
        try:
            return decode(data, self.background), self.fields(index)
        except (DarkroomError, MemoryError):  # a process without memory says nothing about the sample
            raise
        except Exception as error:
            raise self._unreadable(index, describe(error)) from error

    def encoded(self, index: int) -> bytes:
        """The picture's bytes as they were in the source.

        Raises:
            DataError: they are damaged or not all there.
            StorageError: storage answers with errors.
            IndexError: there is no such sample.
        """
        record = self.records[index]
        return self._read(index, int(record["image_offset"]), int(record["image_size"]))

    def encoded_with_caption(self, index: int) -> tuple[memoryview, str]:
        """What training needs of a sample, in one read where its two members lie side by side.

        Raises:
            DataError: they are damaged or not all there.
            StorageError: storage answers with errors.
            IndexError: there is no such sample.
        """
        _, size, length, start, fields, *_ = self._plain_records[index].item()
        fields -= start
        if not size <= fields <= size + _BESIDE:
            return memoryview(self.encoded(index)), self.caption(index)
        data = memoryview(self._read(index, start, fields + length))
        try:
            return data[:size], str(json.loads(str(data[fields:], "utf-8"))["caption"])
        except (ValueError, KeyError, TypeError):  # unusual or damaged: the slower way tells them apart
            return data[:size], self.caption(index)

    def fields(self, index: int) -> dict[str, Any]:
        """The stored fields of a sample; ``caption`` is always there.

        Raises:
            DataError: they are damaged or not all there.
            StorageError: storage answers with errors.
            IndexError: there is no such sample.
        """
        record = self.records[index]
        data = self._read(index, int(record["json_offset"]), int(record["json_size"]))
        try:
            return {"caption": "", **parse_object(data)}
        except ValueError as error:
            raise self._unreadable(index, describe(error)) from error

    def caption(self, index: int) -> str:
        """A sample's caption, without reading its picture.

        Raises:
            DataError: its fields are damaged or not all there.
            StorageError: storage answers with errors.
            IndexError: there is no such sample.
        """
        return str(self.fields(index)["caption"])

    def key(self, index: int) -> str:
        """A sample's WebDataset key, from the header before its fields.

        Raises:
            DataError: its fields are damaged or not all there.
            StorageError: storage answers with errors.
            IndexError: there is no such sample.
        """
        header = self._read(index, int(self.records[index]["json_offset"]) - 512, 100)
        return header.rstrip(b"\0").decode("ascii", "replace").removesuffix(".json")

    def _read(self, index: int, offset: int, size: int) -> bytes:
        shard = int(self._plain_records["shard"][index])
        if shard >= len(self.shards):
            raise self._unreadable(index, f"its index names shard {shard} of {len(self.shards)}")
        data = self._files.read(self.shards[shard], offset, size)
        if len(data) != size:
            raise self._unreadable(index, f"{len(data)} of {size} bytes at {offset} of {self.shards[shard]}")
        return data

    def _unreadable(self, index: int, reason: str) -> DataError:
        return DataError(
            "A sample cannot be read.",
            value=f"{self.name}[{index}] of {self._place}",
            rule=reason,
            mend="darkroom data show --verify compares every file with its checksum",
        )
