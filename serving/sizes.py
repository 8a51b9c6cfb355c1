"""Which pictures a model can make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from serving.errors import RequestError
from training.errors import UsageError

if TYPE_CHECKING:
    from training.bundle import LoadedBundle

Size = tuple[int, int]
"""Width and height, in pixels."""


@dataclass(frozen=True)
class Sizes:
    """Which pictures a model can make: those that it was trained at, and where ``max_pixels`` is set, all that fit.

    Attributes:
        trained: what the model was trained at; the first one is made where a request names none.
        multiple: of which sides must be multiples, in pixels: the network's strides times the autoencoder's.
        max_side: the longest side that the network has positions for, in pixels; None is any.
        max_pixels: the largest other picture; None makes no others.
    """

    trained: tuple[Size, ...]
    multiple: int = 1
    max_side: int | None = None
    max_pixels: int | None = None

    @classmethod
    def only(cls, resolution: int) -> Sizes:
        """Squares of one size and nothing else."""
        return cls(((resolution, resolution),))

    @property
    def default(self) -> Size:
        """What is made where a request names no size."""
        return self.trained[0]

    def check(self, width: int, height: int, *, param: str = "size") -> None:
        """Refuse a size that the model cannot make.

        Args:
            width: in pixels.
            height: in pixels.
            param: the request's field, for the error.

        Raises:
            RequestError: with the rule, and sizes near the wished one that can be made.
        """
        if (width, height) in self.trained or self._fits(width, height):
            return
        if self.max_pixels is None:
            message, rule = f"This model makes images of {self._told()} pixels.", "a size that the model was trained at"
        else:
            message, rule = "This model makes no images of this size.", self._rule()
        options = [*(_text(size) for size in self._near(width, height)), "auto"]
        wished = _text((width, height))
        raise RequestError(UsageError(message, value=wished, rule=rule, options=options), param=param)

    def _fits(self, width: int, height: int) -> bool:
        if self.max_pixels is None or min(width, height) < 1:
            return False
        short_enough = self.max_side is None or max(width, height) <= self.max_side
        return (
            width % self.multiple == 0
            and height % self.multiple == 0
            and short_enough
            and width * height <= self.max_pixels
        )

    def _rule(self) -> str:
        longest = "" if self.max_side is None else f", each at most {self.max_side}"
        return f"sides that are multiples of {self.multiple}{longest}, and at most {self.max_pixels} pixels in all"

    def _told(self) -> str:
        return ", ".join(_text(size) for size in self.trained)

    def _near(self, width: int, height: int) -> list[Size]:
        """The allowed size nearest in shape, then those that the model was trained at."""
        trained = list(self.trained)
        if self.max_pixels is None or min(width, height) < 1:
            return trained
        shrunk = min(1.0, math.sqrt(self.max_pixels / (width * height)))
        if self.max_side is not None:
            shrunk = min(shrunk, self.max_side / max(width, height))
        near = tuple(
            max(self.multiple, int(side * shrunk) // self.multiple * self.multiple) for side in (width, height)
        )
        found = (near[0], near[1])
        return [found, *trained] if self._fits(*found) and found not in trained else trained


def sizes_of(bundle: LoadedBundle, max_pixels: int | None) -> Sizes:
    """What a bundle's network can make, by its own config and the recipe that trained it.

    Args:
        bundle: whose network.
        max_pixels: the largest picture of a size that it was not trained at; None makes no others.
    """
    config: Any = bundle.module.config
    factor = bundle.canvas.factor
    trained = _trained(bundle.canvas.resolution, bundle.provenance.recipe)
    name = type(bundle.module).__name__
    if name == "DiTTransformer2DModel":  # diffusers' puts its patches together as a square
        return Sizes(trained)
    if name.startswith("UNet"):
        return Sizes(trained, 2 ** (len(config["block_out_channels"]) - 1) * factor, None, max_pixels)
    patch = (2 if name == "FluxTransformer2DModel" else int(config.get("patch_size") or 1)) * factor
    most = config.get("pos_embed_max_size")
    return Sizes(trained, patch, int(most) * patch if most else None, max_pixels)


def _trained(resolution: int, recipe: Mapping[str, Any]) -> tuple[Size, ...]:
    """The square first, then every shape that the recipe's buckets have."""
    from training.data.buckets import BucketsConfig, buckets_of

    data = recipe.get("data")
    told = data.get("buckets") if isinstance(data, Mapping) else None
    try:
        buckets = buckets_of(resolution, BucketsConfig.model_validate(told or {}))
    except ValidationError:  # of a recipe that was written for another version
        buckets = ()
    shapes = [(each.width, each.height) for each in buckets]
    return tuple(dict.fromkeys([(resolution, resolution), *shapes]))


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
