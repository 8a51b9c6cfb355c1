"""The cache of what an encoder made of a split: one file per image shard, found by what it was made of.

    DATA/encoded/<kind>-<key>/about.json
    DATA/encoded/<kind>-<key>/<image shard's stem>.safetensors

The key is a hash of ``about``: the encoder's weights, the transform of its input and the type of the values. The file
of an image shard counts only while the shard's sha256 is the one that the file was made of, so that a shard which was
rewritten (``darkroom data forget``) is encoded again and nothing else is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from training.data.captions import canonical
from training.data.dataset import Dataset
from training.data.encoded.image_shards import ImageShards
from training.data.encoded.place import Place, place_of
from training.data.encoded.shard_file import ReadRange, ShardFile, ShardFileWriter, data_sha256, read_shard_file
from training.data.local_store import written
from training.data.manifest import SplitName
from training.data.storage import Folder
from training.errors import StorageError

ABOUT = "about.json"
ENDING = ".safetensors"
ABANDONED = ".partial"
_OPEN = 256
"""Files that stay open; those beyond are opened again."""
_ABANDONED_S = 3600.0
"""A partial file that nobody has written to for so long belongs to a process that was killed."""

_log = logging.getLogger(__name__)


def key_of(about: Mapping[str, Any]) -> str:
    """32 hexadecimal digits that name an encoder, its transform and its type."""
    return hashlib.sha256(canonical(dict(about))).hexdigest()[:32]


def encoded_name(image_shard: str) -> str:
    """The file that belongs to an image shard's."""
    return image_shard.removesuffix(".tar") + ENDING


class OpenShard:
    """A whole file that is being read, closed with its last reference. Threads may share it.

    Args:
        path: of the file.
        file: its header.

    Attributes:
        tables: its small arrays.
        stored: the type of its values.
        row_shape: of one value row.

    Raises:
        StorageError: it cannot be read.
    """

    def __init__(self, path: Path, file: ShardFile) -> None:
        self._file = file
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
            self.tables = file.tables(self._read)
        except (OSError, ValueError) as error:
            raise StorageError("An encoded shard cannot be read.", value=str(path), rule=str(error)) from error
        self.stored, self.row_shape = file.dtype, file.row_shape

    def values(self, first: int, count: int) -> bytes:
        """Value rows.

        Raises:
            ValueError: they are not there.
            OSError: storage answers with errors.
        """
        start, size = self._file.span(first, count)
        data = self._read(start, size)
        if len(data) != size:
            raise ValueError(f"{len(data)} of {size} bytes at {start}")
        return data

    def _read(self, start: int, size: int) -> bytes:
        # pread and no mapping: a file that shrinks is an error with a name, and not a signal that kills the process
        return os.pread(self._descriptor, size, start)


class Cache:
    """One split's files of one kind and key.

    Args:
        place: where the encodings of the data set lie.
        shards: the image shards of the split.
        kind: ``"text"`` or ``"latents"``.
        about: all that the values depend on apart from the images; JSON.
    """

    def __init__(self, place: Place, shards: ImageShards, kind: str, about: Mapping[str, Any]) -> None:
        self.about = {"kind": kind, **about}
        self.key = key_of(self.about)
        self.place = place.child(f"{kind}-{self.key}")
        self.shards = shards
        self._known: OrderedDict[int, OpenShard] = OrderedDict()

    @classmethod
    def of(cls, dataset: Dataset, split: SplitName, kind: str, about: Mapping[str, Any]) -> Cache:
        """That of a split of a data set."""
        return cls(place_of(dataset), ImageShards(dataset.split(split), dataset.manifest.files), kind, about)

    def name(self, number: int) -> str:
        """The file of an image shard."""
        return encoded_name(self.shards[number].name)

    def find(self, number: int, *, thorough: bool = False) -> ShardFile | None:
        """The whole file of an image shard as it is now, or None; fetched if it is only beside the images.

        Args:
            number: the image shard.
            thorough: compare the data with its checksum, and not its size alone.

        Raises:
            StorageError: storage answers with errors.
        """
        found = self._look(self.place.folder, number, thorough)
        if found is None and self.place.origin is not None and self._look(self.place.origin, number, False):
            self.place.origin.download(self.name(number), self.place.path / self.name(number))
            found = self._look(self.place.folder, number, True)
        return found

    def file(self, number: int) -> OpenShard:
        """The file of an image shard, which must be there; it stays open.

        Raises:
            StorageError: the image shard was not encoded, its file is damaged, or storage answers with errors.
        """
        known = self._known.get(number)
        if known is None:
            found = self.find(number)
            if found is None:
                raise self.damaged(number, "a whole file, made of the image shard as it is now")
            known = self._known[number] = OpenShard(self.place.path / self.name(number), found)
            if len(self._known) > _OPEN:
                with suppress(KeyError):  # another thread was faster
                    self._known.popitem(last=False)
        return known

    def values(self, number: int, first: int, count: int) -> bytes:
        """Value rows of one file.

        Raises:
            StorageError: they are not there, or storage answers with errors.
        """
        file = self.file(number)
        try:
            return file.values(first, count)
        except (OSError, ValueError) as error:
            raise self.damaged(number, str(error)) from error

    def damaged(self, number: int, reason: str) -> StorageError:
        """What to say of a file that cannot be used: the samples are whole, and none must be left out for it."""
        return StorageError(
            "An encoded shard cannot be read.",
            value=self.place.folder.url(self.name(number)),
            rule=reason,
            mend="the same command again encodes it, and so does `darkroom data encode`",
        )

    @contextmanager
    def writing(
        self, number: int, *, tables: Mapping[str, np.ndarray], dtype: str, row_shape: Sequence[int]
    ) -> Iterator[ShardFileWriter]:
        """Write the file of an image shard; it appears whole or not at all.

        Two processes may write the same file at once; the last rename stays, and either is right.

        Raises:
            StorageError: it cannot be stored.
        """
        shard, name = self.shards[number], self.name(number)
        metadata = {"key": self.key, "image_shard": shard.name, "image_shard_sha256": shard.sha256}
        folder = self.place.folder
        if not folder.exists(ABOUT):
            folder.write(ABOUT, (json.dumps(self.about, indent=2, sort_keys=True) + "\n").encode())
        try:
            with (
                written(self.place.path / name) as file,
                ShardFileWriter(file, tables=tables, dtype=dtype, row_shape=row_shape, metadata=metadata) as writer,
            ):
                yield writer
        except OSError as error:
            raise StorageError(
                "An encoded shard cannot be written.",
                value=str(self.place.path / name),
                rule=error.strerror or str(error),
                mend="make room, then the same command again goes on",
            ) from error
        self._known.pop(number, None)

    def share(self, number: int) -> None:
        """Put a file beside the images too, so that other machines fetch it.

        Raises:
            StorageError: the storage refuses.
        """
        if self.place.origin is not None:
            for name in (ABOUT, self.name(number)):
                self.place.origin.upload(self.place.path / name, name)

    def _reader(self, folder: Folder, number: int) -> ReadRange:
        return partial(folder.read_range, self.name(number))

    def _look(self, folder: Folder, number: int, thorough: bool) -> ShardFile | None:
        name, read = self.name(number), self._reader(folder, number)
        try:
            found = read_shard_file(read)
            size = folder.size(name)
        except FileNotFoundError:
            return None
        except ValueError as error:
            _log.warning("%s is passed over: %s", folder.url(name), error)
            return None
        if found.metadata.get("image_shard_sha256") != self.shards[number].sha256:
            return None  # it is of the shard before that was rewritten
        if size != found.size or (thorough and data_sha256(read, size) != found.metadata.get("sha256")):
            _log.warning("%s is passed over, for it is damaged", folder.url(name))
            return None
        return found


def sweep(folder: Path, image_shards: Collection[str]) -> list[str]:
    """Remove what belongs to image shards that are gone, and what killed processes left half-written.

    Args:
        folder: of one kind and key.
        image_shards: all that the data set has.

    Returns:
        The names of the files that were removed.
    """
    keep = {encoded_name(name) for name in image_shards} | {ABOUT}
    removed = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ABANDONED:
            gone = time.time() - path.stat().st_mtime > _ABANDONED_S
        else:
            gone = path.suffix == ENDING and name not in keep
        if gone:
            path.unlink(missing_ok=True)
            removed.append(name)
    return removed
