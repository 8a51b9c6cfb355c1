"""Whether a recipe's network can be told and shown what the recipe asks; read without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from training.data.buckets import BucketsConfig, buckets_of


class _Sized(Protocol):
    @property
    def resolution(self) -> int: ...

    def check(self, kind: str, sizes: Sequence[tuple[int, int]]) -> None: ...


def require_fitting(model: _Sized, kind: str, buckets: BucketsConfig, *, factor: int) -> None:
    """Refuse a network that cannot be told its conditioning, or shown a shape of the training pictures.

    Args:
        model: a family's section.
        kind: of the conditioning.
        buckets: shapes of the training pictures.
        factor: pixels of a side for one value of what the network sees; 0 where that is not known yet.

    Raises:
        ValueError: with the rule.
    """
    shapes = [(model.resolution, model.resolution)]
    shapes += [(each.width, each.height) for each in buckets_of(model.resolution, buckets)]
    if factor > 1:
        for side in {side for shape in shapes for side in shape}:
            if side % factor:
                raise ValueError(f"a side of {side} pixels must be a multiple of {factor}, for the autoencoder")
    model.check(kind, [(width // factor, height // factor) for width, height in shapes] if factor else [])
