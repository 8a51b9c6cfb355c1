"""Which rows may share a call of the network."""

from __future__ import annotations

from typing import NamedTuple


class Bucket(NamedTuple):
    """Rows of one size and one adapter: they may share a call of the network, others may not.

    Attributes:
        height: of the pictures, in pixels.
        width: of the pictures, in pixels.
        adapter: the LoRA's name; None is the model alone.
    """

    height: int
    width: int
    adapter: str | None = None
