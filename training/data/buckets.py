"""Buckets: the shapes that pictures are cut to, and which sample goes to which.

Multi-aspect training (NovelAI 2022, "NovelAI improvements on Stable Diffusion"; SDXL, Podell et al. 2023, section 2.3):
a batch holds pictures of one shape, and each picture goes to the shape that cuts away least of it.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from training.data.disk_cache import user_cache
from training.errors import StorageError

_CHUNK = 1 << 20
"""Samples looked at together."""


class BucketsConfig(BaseModel):
    """The shapes of training pictures."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    aspect_limit: float = Field(default=1.0, ge=1, le=16)
    """Width over height of the widest shape, and height over width of the tallest; 1 cuts every picture to a square."""
    step: int = Field(default=64, ge=1, le=512)
    """The sides of shapes that are no square of the model's resolution are multiples of so many pixels."""
    resolutions: tuple[int, ...] = Field(default=(), max_length=8)
    """Resolutions beside the model's, e.g. a lower one for pictures that would have to be enlarged, in pixels."""


class Bucket(NamedTuple):
    """A shape.

    Attributes:
        width: pixels.
        height: pixels.
        resolution: the side of the square whose area it comes near.
    """

    width: int
    height: int
    resolution: int


def buckets_of(resolution: int, config: BucketsConfig) -> tuple[Bucket, ...]:
    """All shapes, by resolution and then from the tallest to the widest."""
    found: list[Bucket] = []
    for side in sorted({resolution, *config.resolutions}):
        found.extend(sorted(_of_area(side, config), key=lambda each: each.width / each.height))
    return tuple(found)


def _of_area(side: int, config: BucketsConfig) -> set[Bucket]:
    """The square, and every shape of multiples of the step that is as large as the square's area allows."""
    step, limit, area = config.step, config.aspect_limit, side * side
    shapes = {Bucket(side, side, side)}
    for across in range(step, int(side * limit) + 1, step):
        along = area // across // step * step
        if along and across < side and along > side and along <= across * limit:
            widest = area // along // step * step  # another multiple may fit beside the same long side
            shapes |= {Bucket(widest, along, side), Bucket(along, widest, side)}
    return shapes


def assign(widths: np.ndarray, heights: np.ndarray, buckets: tuple[Bucket, ...]) -> np.ndarray:
    """The bucket of each sample, a pure function of its size.

    Of the resolutions, the largest that no picture has to be enlarged for, by its area, or else the smallest; of its
    shapes, the one with the nearest ratio of sides, where a factor counts like its inverse. Products of float64 are
    rounded alike everywhere, so that every machine agrees; logarithms are not.

    Args:
        widths: pixels; 0 where it is not known, which counts as a small square.
        heights: pixels.
        buckets: as ``buckets_of`` orders them.

    Returns:
        int16 of the shape of ``widths``.
    """
    known = (widths > 0) & (heights > 0)
    wide = np.where(known, widths, 1).astype(np.float64)
    high = np.where(known, heights, 1).astype(np.float64)
    sides = sorted({each.resolution for each in buckets})
    result = np.empty(wide.shape, dtype=np.int16)
    level = sum(((wide * high >= side * side).astype(np.int64) for side in sides[1:]), np.zeros(wide.shape, np.int64))
    for number, side in enumerate(sides):
        chosen = level == number
        result[chosen] = _nearest(wide[chosen], high[chosen], buckets, side)
    return result


def _nearest(wide: np.ndarray, high: np.ndarray, buckets: tuple[Bucket, ...], side: int) -> np.ndarray:
    numbers = [number for number, each in enumerate(buckets) if each.resolution == side]
    place = np.zeros(wide.shape, dtype=np.int64)
    for one, other in itertools.pairwise(numbers):
        # beyond the geometric mean of two neighbours' ratios the second is nearer: (w/h)^2 > (w1/h1) (w2/h2)
        across = float(buckets[one].width * buckets[other].width)
        along = float(buckets[one].height * buckets[other].height)
        place += wide * wide * along > high * high * across
    return np.array(numbers, dtype=np.int16)[place]


@dataclass(frozen=True)
class Waste:
    """What cutting to shapes costs.

    Attributes:
        cut: share of all pixels that lie outside the cut, 0..1.
        enlarged: share of the pictures that are smaller than their shape, 0..1.
        looked_at: samples that this was computed from, evenly spread.
    """

    cut: float
    enlarged: float
    looked_at: int


def waste(records: np.ndarray, buckets: tuple[Bucket, ...], *, at_most: int = 1 << 16) -> Waste:
    """What cutting to shapes costs, from the sizes in a split's index; no picture is padded.

    Args:
        records: the index.
        buckets: the shapes in use.
        at_most: samples to look at.
    """
    some = records[:: max(1, -(-len(records) // at_most))]
    wide, high = some["width"].astype(np.float64), some["height"].astype(np.float64)
    known = (wide > 0) & (high > 0)
    wide, high = wide[known], high[known]
    if not len(wide):
        return Waste(0.0, 0.0, 0)
    shapes = np.array(buckets, dtype=np.float64)[assign(wide, high, buckets)]
    scale = np.maximum(shapes[:, 0] / wide, shapes[:, 1] / high)
    kept = shapes[:, 0] * shapes[:, 1] / scale**2
    return Waste(float(1 - kept.sum() / (wide * high).sum()), float((scale > 1).mean()), len(wide))


def account(records: np.ndarray, members: Members) -> str:
    """What a run cuts its pictures to and what that costs, in one line for people."""
    shapes = ", ".join(
        f"{each.width} x {each.height} ({count})" for each, count in zip(members.buckets, members.counts, strict=True)
    )
    lost = waste(records, members.buckets)
    if not lost.looked_at:
        return f"pictures are cut to {shapes}; the index does not say how large they are"
    return (
        f"pictures are cut to {shapes}; {lost.cut:.1%} of all pixels lie outside the cuts,"
        f" {lost.enlarged:.1%} of the pictures are enlarged, none is padded"
    )


class Members:
    """Which samples each bucket holds, in the order of the index; the lists are mapped, not held.

    Attributes:
        buckets: those in use.
        counts: samples in each.
    """

    def __init__(self, buckets: tuple[Bucket, ...], counts: tuple[int, ...], ids: np.ndarray | None = None) -> None:
        self.buckets, self.counts = buckets, counts
        self._ids = ids
        self._starts = (0, *np.cumsum(counts).tolist())

    def ids(self, bucket: int, places: np.ndarray) -> np.ndarray:
        """The sample ids, int64, at places of a bucket."""
        if self._ids is None:
            return places.astype(np.int64)
        ids: np.ndarray = self._ids[self._starts[bucket] + places].astype(np.int64)
        return ids

    @classmethod
    def open(
        cls, records: np.ndarray, buckets: tuple[Bucket, ...], *, fewest: int, data_hash: str, cache: Path | None = None
    ) -> Members:
        """Sort the samples into buckets, or map what an earlier call wrote.

        A bucket that would hold fewer than ``fewest`` samples is closed, and they go to the nearest one that is open:
        a batch of such a bucket would hold the same picture several times.

        Args:
            records: the split's index.
            buckets: all shapes; one alone needs no list.
            fewest: samples that a bucket must hold, the global batch.
            data_hash: names the data set and its split.
            cache: a folder on this machine, for the lists; the user's cache where None.

        Raises:
            StorageError: the lists cannot be written.
        """
        if len(buckets) == 1:
            return cls(buckets, (len(records),))
        folder = (cache or user_cache()) / "buckets"
        asked = json.dumps([data_hash, len(records), fewest, buckets])
        path = folder / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.npy"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # of a node's processes, one sorts and the others wait
                found = _sorted(path, len(records))
                if found is None:
                    _sort(records, buckets, fewest, path)
                    found = _sorted(path, len(records))
        except OSError as error:
            raise StorageError(
                "The lists of the buckets cannot be written or read.",
                value=str(folder),
                rule=f"{error.strerror}; {4 * len(records) / 1e6:.0f} MB of room",
                mend="--set data.disk_cache.folder=FOLDER with room",
            ) from error
        if found is None:
            raise StorageError("The lists of the buckets are not what was just written.", value=str(path))
        return found


def _sorted(path: Path, count: int) -> Members | None:
    """The lists that were written; None where they are not there, or not whole, for the machine crashed."""
    try:
        facts = json.loads(path.with_suffix(".json").read_bytes())
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
        buckets, counts = tuple(Bucket(*each) for each in facts["buckets"]), tuple(facts["counts"])
    except (FileNotFoundError, ValueError, EOFError, KeyError, TypeError):
        return None
    return Members(buckets, counts, ids) if len(ids) == sum(counts) == count else None


def _sort(records: np.ndarray, buckets: tuple[Bucket, ...], fewest: int, path: Path) -> None:
    """Count, close what holds too few, and write the ids bucket by bucket; the JSON file comes last."""
    counts = _count(records, buckets)
    while (counts < fewest).any() and len(buckets) > 1:
        keep = counts >= fewest
        if not keep.any():
            keep[np.argmax(counts)] = True
        buckets = tuple(each for each, kept in zip(buckets, keep, strict=True) if kept)
        counts = _count(records, buckets)
    aside = path.with_suffix(f".{os.getpid()}")
    kind = np.uint32 if len(records) < 2**32 else np.uint64
    out = np.lib.format.open_memmap(aside, mode="w+", dtype=kind, shape=(len(records),))
    with aside.open("r+b") as file:  # a disk that is full is an error here, and a signal that kills while it is mapped
        os.posix_fallocate(file.fileno(), 0, aside.stat().st_size)
    cursors = np.concatenate([[0], np.cumsum(counts)])
    for start, part in _parts(records):
        assigned = assign(part["width"], part["height"], buckets)
        sorted_ids = np.argsort(assigned, kind="stable")
        ends = np.searchsorted(assigned[sorted_ids], np.arange(len(buckets) + 1))
        for number in range(len(buckets)):
            ids = sorted_ids[ends[number] : ends[number + 1]] + start
            out[cursors[number] : cursors[number] + len(ids)] = ids
            cursors[number] += len(ids)
    out.flush()
    aside.replace(path)
    aside.write_text(json.dumps({"buckets": buckets, "counts": counts.tolist()}))
    aside.replace(path.with_suffix(".json"))


def _count(records: np.ndarray, buckets: tuple[Bucket, ...]) -> np.ndarray:
    counts = np.zeros(len(buckets), dtype=np.int64)
    for _, part in _parts(records):
        counts += np.bincount(assign(part["width"], part["height"], buckets), minlength=len(buckets))
    return counts


def _parts(records: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(records), _CHUNK):
        yield start, records[start : start + _CHUNK]
