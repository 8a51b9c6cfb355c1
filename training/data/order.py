"""Who is read when: a keyed permutation of the samples, evaluated at any position without a list of them."""

from __future__ import annotations

import functools

import numpy as np

from training import noise
from training.errors import UsageError

_ROUNDS = 8


def order(seed: int, epoch: int, positions: np.ndarray, count: int) -> np.ndarray:
    """The samples at ``positions`` of one epoch.

    A balanced Feistel network (Luby and Rackoff 1988, "How to construct pseudorandom permutations from pseudorandom
    functions") permutes the smallest even number of bits that holds ``count``; values outside are walked back in by
    applying it again (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", cycle walking). The domain is
    at most four times ``count``, so the walk takes fewer than four steps on average.

    Args:
        seed: the run's seed.
        epoch: from 0; each has its own permutation.
        positions: int64, each in ``0..count-1``, of any shape.
        count: samples in the split.

    Returns:
        int64 of the shape of ``positions``: a permutation of ``range(count)`` where they cover it.

    Raises:
        UsageError: a position outside the epoch.
    """
    values = np.asarray(positions, dtype=np.int64)
    if values.size and not 0 <= values.min() <= values.max() < count:
        raise UsageError(
            "A position lies outside the epoch.",
            value=(int(values.min()), int(values.max())),
            rule=f"0 <= position < {count}",
        )
    half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    result = _feistel(values.astype(np.uint64), keys, half_bits)
    outside = result >= count
    while outside.any():
        result[outside] = _feistel(result[outside], keys, half_bits)
        outside = result >= count
    return result.astype(np.int64)


@functools.lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    drawn = noise.generator(seed, epoch, "order").integers(0, 2**64, size=_ROUNDS, dtype=np.uint64)
    return tuple(drawn)


def _feistel(values: np.ndarray, keys: tuple[np.uint64, ...], half_bits: int) -> np.ndarray:
    """A permutation of ``range(4**half_bits)``, whatever the round function."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
