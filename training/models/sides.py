"""What sides a family's networks take: rules that a recipe is held to before anything is built."""

from __future__ import annotations

from collections.abc import Iterable

Size = tuple[int, int]
"""Width and height of what a network sees: pixels, or the values of a latent."""


def require_multiples(sizes: Iterable[Size], factor: int, why: str) -> None:
    """Refuse sides that are no multiples.

    Raises:
        ValueError: with the side and the nearest ones that fit.
    """
    for size in sizes:
        for side in size:
            if side % factor:
                below, above = side // factor * factor, (side // factor + 1) * factor
                near = f"{below} or {above}" if below else f"{above}"
                raise ValueError(f"a side of {side} must be a multiple of {factor}, {why}: {near}")


def require_square(sizes: Iterable[Size], family: str) -> None:
    """Refuse pictures of several shapes.

    Raises:
        ValueError: with the shape.
    """
    for width, height in sizes:
        if width != height:
            raise ValueError(
                f"family {family} makes squares only, not {width}x{height}: data.buckets.aspect_limit=1, or a family"
                " that takes shapes: unet, sd3, pixart"
            )


def require_one_size(sizes: Iterable[Size], family: str) -> None:
    """Refuse pictures of several sizes.

    Raises:
        ValueError: with the sizes.
    """
    found = sorted(set(sizes))
    if len(found) > 1:
        told = ", ".join(f"{width}x{height}" for width, height in found)
        raise ValueError(f"family {family} is built for one size, not for {told}: data.buckets.resolutions=[]")
