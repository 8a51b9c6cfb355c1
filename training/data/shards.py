"""Shards: plain WebDataset tars with deterministic bytes, so that the place of every member is known beforehand."""

from __future__ import annotations

import hashlib
import tarfile
from dataclasses import dataclass
from typing import IO

from training.data.manifest import FileFacts

MEMBER_BYTES = tarfile.BLOCKSIZE
"""A member's header; its content is filled up to a multiple of this."""


@dataclass(frozen=True)
class Placed:
    """Where a sample lies: the shard's number, and where its members' bytes start in it."""

    shard: int
    image_offset: int
    json_offset: int


def file_name(name: str, generation: int) -> str:
    """The name of a data set's file, e.g. ``train-000000.tar``; from the second generation on ``train-000000.1.tar``.

    A file of another generation never takes the place of one that readers of the present data set have in use.
    """
    stem, dot, ending = name.rpartition(".")
    return f"{stem}.{generation}{dot}{ending}" if generation else name


def shard_name(split: str, number: int, generation: int = 0) -> str:
    """A shard's file name."""
    return file_name(f"{split}-{number:06d}.tar", generation)


class Packer:
    """Decides where the samples of one split lie, by their sizes alone.

    Args:
        shard_bytes: a sample that would make a shard larger starts the next one.
    """

    def __init__(self, shard_bytes: int) -> None:
        self.shard = -1
        self._shard_bytes = shard_bytes
        self._end = 0

    def place(self, image_size: int, json_size: int) -> Placed:
        """The place of the next sample."""
        needed = image_size + json_size + 4 * MEMBER_BYTES
        if self.shard < 0 or self._end + needed > self._shard_bytes:
            self.shard, self._end = self.shard + 1, 0
        image_offset = self._end + MEMBER_BYTES
        json_offset = image_offset + padded(image_size) + MEMBER_BYTES
        self._end = json_offset + padded(json_size)
        return Placed(self.shard, image_offset, json_offset)


class ShardWriter:
    """Writes image + json pairs into one tar; ``Packer`` says where they come to lie.

    ``webdataset.TarWriter`` writes the same format, but importing it imports torch, which building must not wait for.
    The headers are ``tarfile``'s.

    Args:
        file: the shard, open and empty.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._end = 0

    def add(self, key: str, ending: str, image: bytes, fields: bytes) -> None:
        """Append one sample; a WebDataset key has no dot.

        Raises:
            OSError: the disk is full or gone.
        """
        self._member(f"{key}.{ending}", image)
        self._member(f"{key}.json", fields)

    def copy(self, member: bytes) -> None:
        """Append what was read from another shard: whole members, header and padding included."""
        self._write(member)

    def close(self) -> FileFacts:
        """End the shard: two empty blocks, filled up to a whole record. The file itself stays open."""
        self._write(bytes(2 * MEMBER_BYTES))
        self._write(bytes(-self._end % tarfile.RECORDSIZE))
        return FileFacts(size_bytes=self._end, sha256=self._digest.hexdigest())

    def _member(self, name: str, data: bytes) -> None:
        header = tarfile.TarInfo(name)  # time, user and group are 0: equal samples give equal bytes
        header.size = len(data)
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        self._write(data)
        self._write(bytes(padded(len(data)) - len(data)))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._end += len(data)


def padded(size: int) -> int:
    """Bytes that a member's content takes in a tar."""
    return size + -size % MEMBER_BYTES
