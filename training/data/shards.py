"""Shards: plain WebDataset tars with deterministic bytes, and the place of every member."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO


@dataclass(frozen=True)
class Placed:
    """Where a sample was written: the shard's number and name, and where its members' bytes start in it."""

    shard: int
    name: str
    image_offset: int
    json_offset: int


class ShardWriter:
    """Writes image + json pairs to ``<split>-000000.tar``, ``<split>-000001.tar`` and so on.

    ``webdataset.TarWriter`` writes the same format, but importing it imports torch, which building must not wait
    for, and it tells no offsets. The headers are ``tarfile``'s; the position of our own file is the offset.

    Args:
        folder: where the shards go.
        split: the first part of their names.
        shard_bytes: a sample that would make a shard larger starts the next one.
    """

    def __init__(self, folder: Path, split: str, shard_bytes: int) -> None:
        self.names: list[str] = []
        self._folder = folder
        self._split = split
        self._shard_bytes = shard_bytes
        self._file: BinaryIO | None = None

    def add(self, key: str, ending: str, image: bytes, fields: bytes) -> Placed:
        """Append one sample; a WebDataset key has no dot.

        Raises:
            OSError: the disk is full or gone.
        """
        file = self._room_for(len(image) + len(fields) + 4 * tarfile.BLOCKSIZE)
        image_offset = self._member(file, f"{key}.{ending}", image)
        json_offset = self._member(file, f"{key}.json", fields)
        return Placed(len(self.names) - 1, self.names[-1], image_offset, json_offset)

    def _room_for(self, needed: int) -> BinaryIO:
        if self._file is not None and self._file.tell() + needed <= self._shard_bytes:
            return self._file
        self.close()
        self.names.append(f"{self._split}-{len(self.names):06d}.tar")
        self._file = (self._folder / self.names[-1]).open("wb")
        return self._file

    @staticmethod
    def _member(file: BinaryIO, name: str, data: bytes) -> int:
        header = tarfile.TarInfo(name)  # time, user and group are 0: equal samples give equal bytes
        header.size = len(data)
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        start = file.tell()
        file.write(data)
        file.write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return start

    def close(self) -> None:
        """End the current shard: two empty blocks, filled up to a whole record."""
        if self._file is not None:
            self._file.write(bytes(2 * tarfile.BLOCKSIZE))
            self._file.write(bytes(-self._file.tell() % tarfile.RECORDSIZE))
            self._file.close()
        self._file = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
