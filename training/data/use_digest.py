"""The digest of what was consumed: a sum of one hash per row, so that no order of rows or ranks changes it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LANES = 2
_KEYS = 3


@dataclass(frozen=True)
class Use:
    """What some rows of a step come to.

    Attributes:
        rows: rows that were trained on.
        missing: rows whose sample could not be read; they are not in the digest.
        digest: 128 bits in two lanes, the sums of the rows' hashes modulo 2^64.
    """

    rows: int
    missing: int
    digest: tuple[int, int]

    def parts(self) -> tuple[int, ...]:
        """Integers that ranks can add up: no sum of 32-bit halves over 2^31 ranks leaves an int64."""
        return (self.rows, self.missing, *(half for lane in self.digest for half in (lane & 0xFFFFFFFF, lane >> 32)))

    @classmethod
    def of_parts(cls, parts: Sequence[int]) -> Use:
        """What the summed ``parts`` of all ranks come to."""
        rows, missing, low_0, high_0, low_1, high_1 = parts
        return cls(rows, missing, ((low_0 + (high_0 << 32)) % 2**64, (low_1 + (high_1 << 32)) % 2**64))


class RowHash:
    """The hash of one row: which sample, in which epoch, with which bytes.

    Finds mistakes, not forgers: whoever can write a ledger can also compute a digest.

    Args:
        data_hash: the data set's name, which keys the hash.
    """

    def __init__(self, data_hash: str) -> None:
        drawn = hashlib.blake2b(f"use\x1f{data_hash}".encode(), digest_size=8 * LANES * _KEYS).digest()
        self._keys = np.frombuffer(drawn, dtype="<u8").reshape(LANES, _KEYS)

    def rows(self, epochs: np.ndarray, ids: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        """Hashes, uint64 ``[*shape, 2]``, of rows given by arrays of one shape.

        Args:
            epochs: the epoch of each row.
            ids: its sample id.
            prefixes: the index's ``sha256_prefix`` of that sample.
        """
        epochs, ids, prefixes = (np.asarray(each).astype(np.uint64, copy=False) for each in (epochs, ids, prefixes))
        hashed = np.empty((*ids.shape, LANES), dtype=np.uint64)
        for lane, (for_id, for_epoch, for_bytes) in enumerate(self._keys):
            hashed[..., lane] = _mix(_mix(_mix(ids ^ for_id) ^ epochs ^ for_epoch) ^ prefixes ^ for_bytes)
        return hashed

    def use(self, epochs: Sequence[int], ids: Sequence[int], valid: Sequence[bool], prefixes: np.ndarray) -> Use:
        """What one rank's rows come to; those that are not valid count as missing."""
        kept = np.asarray(valid, dtype=bool)
        hashed = self.rows(np.asarray(epochs)[kept], np.asarray(ids)[kept], prefixes[kept])
        low, high = hashed.sum(axis=0, dtype=np.uint64).tolist()
        rows = int(kept.sum())
        return Use(rows, len(kept) - rows, (low, high))


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
