"""Copies within a set: files with the same bytes, and pictures that look the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from training.data.clean.hash_index import HashIndex

_BLOCK = 1024
_PAIRS = 1 << 16
"""Pairs of thumbnails that are compared together."""


class DuplicatesConfig(BaseModel):
    """Which pictures count as copies of another; of several, the earliest input stays."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    exact: bool = True
    """Drop a file with the same bytes as an earlier input; a file that is named again with another caption stays."""
    near: bool = True
    """Drop a picture that looks like an earlier one: scaled, saved again, in another format."""
    max_distance_bits: int = Field(default=3, ge=0, le=8)
    """Perceptual hashes of 64 bits that differ in at most this many make two pictures candidates."""
    max_difference: int = Field(default=5, ge=0, le=255)
    """Candidates are copies if no pixel of their thumbnails differs by more than this many of 255 steps."""


def exact_copies(
    digests: Sequence[bytes], sources: Sequence[str], captions: Sequence[str]
) -> Iterator[tuple[int, int]]:
    """Pairs of (copy, the first with these bytes).

    A file that a manifest names in several rows with several captions is one picture with several captions.

    Args:
        digests: the sha256 of each input's bytes, in the order of the inputs.
        sources: the file of each.
        captions: the caption of each.
    """
    first: dict[bytes, int] = {}
    told: set[tuple[int, str]] = set()
    for row, (digest, source, caption) in enumerate(zip(digests, sources, captions, strict=True)):
        earlier = first.setdefault(digest, row)
        again = earlier != row and (source != sources[earlier] or (earlier, caption) in told)
        told.add((earlier, caption))
        if again:
            yield row, earlier


@dataclass(frozen=True, slots=True)
class Copies:
    """What near duplicates came to, one entry for each picture.

    Attributes:
        of: the row that is kept instead, -1 for what stays.
        difference: the largest difference of the two thumbnails, in steps of 255.
    """

    of: np.ndarray
    difference: np.ndarray


def near_copies(hashes: np.ndarray, thumbnails: np.ndarray, config: DuplicatesConfig) -> Copies:
    """Pictures that look like an earlier one that stays, so that no chain of small steps drops what is different.

    A picture is compared with pictures that stay only, so a million copies of one cost a million look-ups.

    Args:
        hashes: uint64 ``[N]``, in the order of the inputs.
        thumbnails: uint8 ``[N, THUMBNAIL_BYTES]``.
        config: what counts as alike.
    """
    index = HashIndex(config.max_distance_bits, len(hashes))
    found = Copies(np.full(len(hashes), -1, np.int64), np.zeros(len(hashes), np.int16))
    for start in range(0, len(hashes), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(hashes)))
        for at, earlier in index.near(hashes[rows]):
            _settle(found, rows[at], earlier, thumbnails, config.max_difference)
        rest = rows[found.of[rows] < 0]
        distances = np.bitwise_count(hashes[rest, None] ^ hashes[None, rest])
        first, second = np.nonzero(np.triu(distances <= config.max_distance_bits, 1))
        _settle(found, rest[second], rest[first], thumbnails, config.max_difference)
        kept = rest[found.of[rest] < 0]
        index.add(hashes[kept], kept)
    return found


def _settle(found: Copies, later: np.ndarray, earlier: np.ndarray, thumbnails: np.ndarray, limit: int) -> None:
    """Note which of the later rows are copies of an earlier one that stays; of several, of the earliest."""
    order = np.lexsort((earlier, later))
    for start in range(0, len(order), _PAIRS):
        part = order[start : start + _PAIRS]
        one, other = thumbnails[later[part]], thumbnails[earlier[part]]
        differences = (np.maximum(one, other) - np.minimum(one, other)).max(1)
        alike = differences <= limit
        pairs = zip(later[part][alike], earlier[part][alike], differences[alike], strict=True)
        for row, before, difference in pairs:
            # pairs come by their later row: what an earlier row is was settled before it is asked for
            if found.of[before] < 0 and (found.of[row] < 0 or before < found.of[row]):
                found.of[row], found.difference[row] = before, difference
