"""Irrelevant pictures: unlike all others in feature space; optional."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

_FITTED = 4096
"""Pictures that the subspace is fitted to: those with the lowest sha256, a draw that no order of inputs changes."""
_ROUNDS = 3
_TRUSTED = 0.9
"""The share of pictures, the nearest ones, that the next round is fitted to."""
_FEWEST = 64
_BLOCK = 4096
_TINY = 1e-5
"""What counts as no length: float16 features are no finer."""


class OutlierConfig(BaseModel):
    """Whether and where to cut by distance from the rest.

    It is off unless asked for: it costs many times what decoding costs, and what is rare is not always irrelevant.
    Look at what it drops.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = False
    """Compute features of every picture (EfficientNet-Lite0 at 96 px), and drop those that are unlike all others."""
    max_deviations: float = Field(default=5.0, gt=0.0)
    """Pictures whose distance is above the median by more than this many robust standard deviations are dropped."""
    components: int = Field(default=32, ge=1, le=256)
    """Dimensions of the subspace that describes the set."""


def outlying(features: np.ndarray, digests: Sequence[bytes], config: OutlierConfig) -> np.ndarray:
    """How unlike all others each picture is.

    The orthogonal distance of robust principal components (after Hubert et al. 2005, ROBPCA): the length of what of
    a picture's features, scaled to length 1, the main directions of the set leave unexplained. They are fitted to
    a sample, and again to those nine tenths of it that lie nearest within them and beside them, so that outliers do
    not draw them their way. Costs grow with the set and not with its square. Distances are stated as deviations from
    their median in units of 1.4826 x their median absolute deviation: the standard deviation where they are normal.

    Args:
        features: ``[N, D]``.
        digests: the sha256 of each.
        config: how many directions.

    Returns:
        float32 ``[N]``; zeros where there are too few pictures to tell.
    """
    count = len(features)
    if count < _FEWEST:
        return np.zeros(count, np.float32)
    drawn = np.sort(np.asarray(sorted(range(count), key=lambda row: digests[row])[:_FITTED]))
    sample = _directions(features[drawn])
    space = _Space.of(sample, min(config.components, count // 8))
    for _ in range(_ROUNDS - 1):
        within, beside = space.distances(sample)
        farthest = np.maximum(_deviations(within), _deviations(beside))
        space = _Space.of(sample[farthest <= np.quantile(farthest, _TRUSTED)], len(space.axes))
    blocks = [features[start : start + _BLOCK] for start in range(0, count, _BLOCK)]
    return _deviations(np.concatenate([space.distances(_directions(block))[1] for block in blocks]))


def _directions(features: np.ndarray) -> np.ndarray:
    vectors = features.astype(np.float32)
    directions: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), _TINY)
    return directions


def _deviations(distances: np.ndarray) -> np.ndarray:
    away = distances - np.median(distances)
    deviations: np.ndarray = away / max(1.4826 * float(np.median(np.abs(away))), _TINY)
    return deviations


@dataclass(frozen=True, slots=True)
class _Space:
    """The main directions of some vectors about their mean, and how far they extend along each."""

    centre: np.ndarray
    axes: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray, components: int) -> _Space:
        centre = vectors.mean(0)
        spread = (vectors - centre).astype(np.float64)
        extents, main = np.linalg.eigh(spread.T @ spread / len(vectors))  # from the least to the most
        lengths = np.sqrt(np.maximum(extents[-components:], _TINY**2)).astype(np.float32)
        return cls(centre, np.ascontiguousarray(main[:, -components:].T.astype(np.float32)), lengths)

    def distances(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each vector from the centre within the directions, in their lengths, and from all of them."""
        spread = vectors - self.centre
        within = spread @ self.axes.T
        return np.linalg.norm(within / self.lengths, axis=1), np.linalg.norm(spread - within @ self.axes, axis=1)
