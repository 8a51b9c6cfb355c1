"""A finished data set, read by index."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from training.data.batch import Sample
from training.data.captions import parse_object
from training.data.clean import describe
from training.data.decode import background_rgb, decode
from training.data.index import read_index
from training.data.manifest import SPLITS, Manifest, SplitFacts, SplitName, check_files, read_manifest
from training.errors import DarkroomError, DataError, StorageError, UsageError

_log = logging.getLogger(__name__)
_MAX_OPEN = 256
"""Shards that a split keeps open; those beyond are opened for each read, for a process may open only so many."""
_PAUSES_S = (0.05, 0.2, 1.0)
"""Pauses before a read that storage refused is tried again: a failover takes a moment, a full table of files too."""


class Dataset:
    """A data set that ``darkroom data build`` made; use ``Dataset.open``.

    Attributes:
        path: its folder.
        manifest: what it holds.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> Dataset:
        """Read the manifest and compare the files' sizes with it; reads no picture.

        Raises:
            DataError: no data set there, or a damaged one.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        check_files(folder, manifest)
        return cls(folder, manifest)

    @property
    def hash(self) -> str:
        """Names the data set: 64 hexadecimal digits."""
        return self.manifest.hash

    def split(self, name: SplitName) -> Split:
        """One split.

        Raises:
            UsageError: there is no such split.
            DataError: its index cannot be read.
        """
        if name not in SPLITS:
            raise UsageError("There is no such split.", value=name, rule="a split of the data set", options=SPLITS)
        return Split(self.path, name, self.manifest.splits[name], background_rgb(self.manifest.config.background))


class Split:
    """The samples of one split. Threads may share it.

    What is wrong with a sample itself is a ``DataError``, which every process meets alike. That storage does not
    answer is a ``StorageError``, which only this process may have met: whoever leaves samples out must not go by it.

    Args:
        folder: the data set's folder.
        name: the split's name.
        facts: the split's part of the manifest.
        background: red, green, blue behind transparent pixels.

    Raises:
        DataError: the index cannot be read.
    """

    def __init__(self, folder: Path, name: SplitName, facts: SplitFacts, background: tuple[int, int, int]) -> None:
        self.name = name
        self.background = background
        self._folder = folder
        self._shards = facts.shards
        self._index = read_index(folder / facts.index, facts.count)
        self._files: dict[int, int] = {}
        self._stale: list[int] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._files, self._stale)

    def __len__(self) -> int:
        return len(self._index)

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
        record = self._index[index]
        return self._read(index, int(record["image_offset"]), int(record["image_size"]))

    def fields(self, index: int) -> dict[str, Any]:
        """The stored fields of a sample; ``caption`` is always there.

        Raises:
            DataError: they are damaged or not all there.
            StorageError: storage answers with errors.
            IndexError: there is no such sample.
        """
        record = self._index[index]
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
        header = self._read(index, int(self._index[index]["json_offset"]) - 512, 100)
        return header.rstrip(b"\0").decode("ascii", "replace").removesuffix(".json")

    def _read(self, index: int, offset: int, size: int) -> bytes:
        # pread and not mmap for the shards: threads share no position, and a shard that shrinks under a running
        # job is an error with a name instead of a SIGBUS that kills the process
        shard = int(self._index[index]["shard"])
        if shard >= len(self._shards):
            raise self._unreadable(index, f"its index names shard {shard} of {len(self._shards)}")
        data = self._patiently(shard, size, offset)
        if len(data) != size:
            raise self._unreadable(index, f"{len(data)} of {size} bytes at {offset} of {self._shards[shard]}")
        return data

    def _patiently(self, shard: int, size: int, offset: int) -> bytes:
        for pause_s in _PAUSES_S:
            try:
                return self._pread(shard, size, offset)
            except OSError as error:
                _log.warning("%s is read again: %s", self._shards[shard], describe(error))
                self._forget(shard)  # a file handle that went stale never recovers
                time.sleep(pause_s)
        try:
            return self._pread(shard, size, offset)
        except OSError as error:
            raise StorageError(
                "A shard cannot be read.",
                value=str(self._folder / self._shards[shard]),
                rule=f"{describe(error)}, {len(_PAUSES_S) + 1} times",
                mend="when the storage answers again, the same command goes on from the newest checkpoint",
            ) from error

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        with self._lock:
            kept = self._files.get(shard)
            if kept is None and len(self._files) < _MAX_OPEN:
                kept = self._files[shard] = os.open(self._folder / self._shards[shard], os.O_RDONLY)
        if kept is not None:
            return os.pread(kept, size, offset)
        with (self._folder / self._shards[shard]).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)

    def _forget(self, shard: int) -> None:
        """Open the shard anew at its next read; other threads may still read from the old descriptor."""
        with self._lock:
            kept = self._files.pop(shard, None)
            if kept is not None:
                self._stale.append(kept)

    def _unreadable(self, index: int, reason: str) -> DataError:
        return DataError(
            "A sample cannot be read.",
            value=f"{self.name}[{index}] of {self._folder}",
            rule=reason,
            mend="darkroom data show --verify compares every file with its checksum",
        )


def _close_all(files: dict[int, int], stale: list[int]) -> None:
    for descriptor in (*files.values(), *stale):
        os.close(descriptor)
