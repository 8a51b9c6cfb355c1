"""Who is read when: a keyed permutation of the samples, evaluated at any position without a list of them.

Samples that lie side by side in a shard are read at about the same time, which is what disks, readahead and ranged
reads want: blocks of consecutive samples are permuted, and windows of permuted blocks are permuted inside. Each epoch
is an exact permutation of all samples. What locality costs: two samples drawn one after the other come from the same
block with a chance of 1 / ``window`` instead of ``block`` / ``count``. Where one window holds all samples, and with
``block=1``, it is a full shuffle.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training import noise
from training.errors import UsageError

BLOCK = 64
"""Consecutive samples that are read together, unless a recipe says otherwise."""
WINDOW = 256
"""Blocks whose samples are mixed, unless a recipe says otherwise."""

_ROUNDS = 8

Keys = tuple[np.uint64, ...]


def order(
    seed: int,
    epoch: int,
    positions: np.ndarray,
    count: int,
    *,
    block: int = BLOCK,
    window: int = WINDOW,
    stream: int = 0,
) -> np.ndarray:
    """The samples at ``positions`` of one epoch.

    Args:
        seed: the run's seed.
        epoch: from 0; each has its own permutation.
        positions: int64, each in ``0..count-1``, of any shape.
        count: samples in the split.
        block: consecutive samples that stay in one window.
        window: blocks that are mixed.
        stream: tells apart the streams of one run, e.g. its buckets.

    Returns:
        int64 of the shape of ``positions``: a permutation of ``range(count)`` where they cover it.

    Raises:
        UsageError: a position outside the epoch, or no block or window.
    """
    values = np.asarray(positions, dtype=np.int64)
    if values.size and not 0 <= values.min() <= values.max() < count:
        raise UsageError(
            "A position lies outside the epoch.",
            value=(int(values.min()), int(values.max())),
            rule=f"0 <= position < {count}",
        )
    if block < 1 or window < 1:
        raise UsageError("A shuffle needs blocks.", value=(block, window), rule="block >= 1 and window >= 1")
    block = min(block, count)
    window = min(window, -(-count // block))  # larger ones mean the same, and their product must fit
    epoch_of = _Epoch(count, block, window, _keys(seed, epoch, stream, "blocks"), _keys(seed, epoch, stream, "inside"))
    return epoch_of.samples(values.ravel()).reshape(values.shape)


@dataclass(frozen=True)
class _Epoch:
    """One epoch's permutation.

    The blocks lie in permuted order, one after the other, in numbered slots; all are of one size but the last block,
    which may be short. Its slot is found by running the permutation of the blocks backwards, and from there on every
    place lies ``gap`` earlier than it would otherwise.
    """

    count: int
    block: int
    window: int
    between: Keys
    inside: Keys

    def samples(self, positions: np.ndarray) -> np.ndarray:
        blocks = -(-self.count // self.block)
        gap = blocks * self.block - self.count
        short_slot = int(_permute(np.array([blocks - 1]), blocks, self.between, inverse=True)[0])
        short_window = short_slot // self.window
        full = self.window * self.block
        after_short = positions >= (short_window + 1) * full - gap
        windows = (positions + after_short * gap) // full
        # the numbers of positions before a window, and in it
        starts = windows * full - (windows > short_window) * gap
        ends = np.minimum((windows + 1) * full - (windows >= short_window) * gap, self.count)
        mixed = self._mixed(positions - starts, ends - starts, windows)
        in_short = windows == short_window
        behind = mixed >= (short_slot - short_window * self.window + 1) * self.block - gap
        mixed += (in_short & behind) * gap
        slots = windows * self.window + mixed // self.block
        samples: np.ndarray = _permute(slots, blocks, self.between) * self.block + mixed % self.block
        return samples

    def _mixed(self, places: np.ndarray, sizes: np.ndarray, windows: np.ndarray) -> np.ndarray:
        mixed = np.empty_like(places)
        for size in np.unique(sizes):  # three at most: full, holding the short block, and the last
            chosen = sizes == size
            mixed[chosen] = _permute(places[chosen], int(size), self.inside, tweak=windows[chosen])
        return mixed


def _permute(
    values: np.ndarray, count: int, keys: Keys, *, tweak: np.ndarray | None = None, inverse: bool = False
) -> np.ndarray:
    """A keyed permutation of ``range(count)``, or the way back.

    A balanced Feistel network (Luby and Rackoff 1988, "How to construct pseudorandom permutations from pseudorandom
    functions") permutes the smallest even number of bits that holds ``count``; values outside are walked back in by
    applying it again (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", cycle walking). The domain is
    at most four times ``count``, so the walk takes fewer than four steps on average.

    Args:
        values: int64, each in ``0..count-1``.
        count: the size of the domain.
        keys: one per round.
        tweak: one per value; each number names a permutation of its own.
        inverse: from the permuted value to the original.
    """
    half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
    own = None if tweak is None else tweak.astype(np.uint64)
    result = _feistel(values.astype(np.uint64), _rounds(keys, own), half_bits, inverse)
    outside = np.flatnonzero(result >= count)
    while len(outside):
        rounds = _rounds(keys, None if own is None else own[outside])
        walked = _feistel(result[outside], rounds, half_bits, inverse)
        result[outside] = walked
        outside = outside[walked >= count]
    return result.astype(np.int64)


def _rounds(keys: Keys, tweak: np.ndarray | None) -> Sequence[np.uint64 | np.ndarray]:
    """The key of each round; with a tweak, one for each value."""
    return keys if tweak is None else [_mix(tweak + key) for key in keys]


@functools.lru_cache(maxsize=256)
def _keys(seed: int, epoch: int, stream: int, purpose: str) -> Keys:
    drawn = noise.generator(seed, epoch, stream, "order", purpose).integers(0, 2**64, size=_ROUNDS, dtype=np.uint64)
    return tuple(drawn)


def _feistel(values: np.ndarray, rounds: Sequence[np.uint64 | np.ndarray], half_bits: int, inverse: bool) -> np.ndarray:
    """A permutation of ``range(4**half_bits)``, whatever the round function."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    if inverse:
        for key in reversed(rounds):
            left, right = right ^ (_mix(left ^ key) & mask), left
    else:
        for key in rounds:
            left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
