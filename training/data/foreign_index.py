"""The samples of a foreign WebDataset shard, found by its headers, and the index that remembers them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from training.data.captions import MAX_SIDECAR_BYTES, canonical
from training.data.decode import Facts, facts_of, open_header
from training.data.findings import Finding, describe
from training.data.index import IndexWriter
from training.data.manifest import SplitFacts, SplitName
from training.data.tar_walk import Member, Read, walk

BESIDE = np.dtype(
    [
        ("header_offset", "<u8"),
        ("text_offset", "<u8"),
        ("text_size", "<u4"),
        ("label_offset", "<u8"),
        ("label_size", "<u4"),
    ]
)
"""What our own index has no field for: where a picture's first header begins, and its ``.txt`` and ``.cls``."""

PICTURES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp"})
_SIDECARS = ("json", "txt", "cls")
_KEY = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]*)", re.DOTALL)
"""WebDataset's: a sample is all members whose names are equal up to the first dot of their last part."""
_HEAD_BYTES = 1 << 16
"""Enough of most pictures to tell their size."""
_MAX_BYTES = 1 << 28
_MAX_PIXELS = 100_000_000

Range = tuple[int, int]
"""Where bytes begin and how many they are; of no bytes, zeros."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture of a shard and what belongs to it.

    Attributes:
        image: the picture's member.
        sidecars: the ranges of its ``.json``, ``.txt`` and ``.cls``.
        facts: what the picture's header says.
        head: a digest of its first bytes.
        sha256: of the whole picture; ``b""`` if it was not read.
    """

    image: Member
    sidecars: dict[str, Range]
    facts: Facts
    head: str
    sha256: bytes

    def seen(self) -> bytes:
        """All that is known of it, for a digest."""
        facts = self.facts
        sizes = [facts.width, facts.height, facts.direct]
        return canonical([self.image.name, self.image.start, self.image.size, self.sidecars, sizes, self.head])


@dataclass(frozen=True, slots=True)
class Skipped:
    """A member that is not used, and why."""

    name: str
    finding: Finding

    def seen(self) -> bytes:
        """All that is known of it, for a digest."""
        return canonical([self.name, self.finding.rule])


def key_of(name: str) -> str:
    """A member's WebDataset key."""
    found = _KEY.fullmatch(name)
    return found[1] if found else name


def samples(read: Read, length: int, *, whole: bool) -> Iterator[Sample | Skipped]:
    """The samples of a shard, in its order, and the members that must not be used; others are passed over.

    Args:
        read: reads the shard.
        length: bytes of the shard.
        whole: read whole pictures and not only their beginnings, for their sha256.
    """
    key, members = "", dict[str, Member]()
    for member in walk(read, length):
        if member.finding is not None:
            yield Skipped(member.name, member.finding)
            continue
        found = _KEY.fullmatch(member.name)
        if found is None:
            continue
        if found[1] != key:
            yield from _sample(read, members, whole)
            key, members = found[1], {}
        members.setdefault(found[2].lower(), member)
    yield from _sample(read, members, whole)


def _sample(read: Read, members: dict[str, Member], whole: bool) -> Iterator[Sample | Skipped]:
    ending = next((kind for kind in members if kind in PICTURES), None) or next(
        (kind for kind in members if kind.rpartition(".")[2] in PICTURES), None
    )
    if ending is None:
        return
    image, sidecars = members[ending], {}
    for kind in _SIDECARS:
        beside = members.get(kind)
        if beside is not None and beside.size > MAX_SIDECAR_BYTES:
            yield Skipped(beside.name, Finding("bad_sidecar", beside.size, MAX_SIDECAR_BYTES, "too many bytes"))
        elif beside is not None:
            sidecars[kind] = (beside.start, beside.size)
    if image.size > _MAX_BYTES:
        yield Skipped(image.name, Finding("too_many_bytes", image.size, _MAX_BYTES))
        return
    data = read(image.start, image.size if whole else min(image.size, _HEAD_BYTES))
    facts = _facts(data)
    if isinstance(facts, Finding) and facts.rule == "undecodable" and len(data) < image.size:
        facts = _facts(read(image.start, image.size))  # its header is longer, or says something at the end
    if isinstance(facts, Finding):
        yield Skipped(image.name, facts)
        return
    head = hashlib.sha256(data[:_HEAD_BYTES]).hexdigest()
    yield Sample(image, sidecars, facts, head, hashlib.sha256(data).digest() if whole else b"")


def _facts(data: bytes) -> Facts | Finding:
    try:
        with open_header(data) as header:
            pixels = header.width * header.height
            if pixels > _MAX_PIXELS:
                return Finding("too_many_pixels", pixels, _MAX_PIXELS)
            return facts_of(header)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever Pillow raises for bytes of strangers
        return Finding("undecodable", detail=describe(error)[:200])


class SplitIndex:
    """Writes the index of one split.

    Args:
        folder: where it goes.
        name: of the split.
    """

    def __init__(self, folder: Path, name: SplitName) -> None:
        self.names = f"{name}.index.npy", f"{name}.beside.npy"
        self.image_bytes = 0
        self._index = IndexWriter(folder / self.names[0])
        self._beside = IndexWriter(folder / self.names[1], BESIDE)

    def add(self, shard: int, sample: Sample) -> None:
        """Append one sample."""
        image, facts = sample.image, sample.facts
        json, text, label = (sample.sidecars.get(kind, (0, 0)) for kind in _SIDECARS)
        prefix = int.from_bytes(sample.sha256[:8], "big")
        sizes = (facts.width, facts.height, facts.direct)
        self._index.append((shard, image.size, json[1], image.start, json[0], prefix, *sizes))
        self._beside.append((image.header, *text, *label))
        self.image_bytes += image.size

    def facts(self, shards: tuple[str, ...]) -> SplitFacts:
        """The split's part of the manifest."""
        return SplitFacts(count=self._index.count, image_bytes=self.image_bytes, index=self.names[0], shards=shards)

    def __enter__(self) -> SplitIndex:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._beside.__exit__(kind, error, at)
        self._index.__exit__(kind, error, at)
