"""A perceptual hash and a thumbnail: what near duplicates are found and verified by."""

from __future__ import annotations

import numpy as np
from PIL import Image

GRID_PX = 64
"""Both are made from the whole picture in a square of this many pixels, whatever its shape."""
_HASHED_PX = 32
_WAVES = 8
_LIGHT_PX = 16
_COLOUR_PX = 8
THUMBNAIL_BYTES = _LIGHT_PX**2 + 2 * _COLOUR_PX**2


def _cosines() -> np.ndarray:
    """Rows 1 to 8 of the 32-point DCT-II, ``[8, 32]``."""
    row, column = np.arange(1, _WAVES + 1)[:, None], np.arange(_HASHED_PX)[None]
    return np.cos(np.pi * row * (2 * column + 1) / (2 * _HASHED_PX)).astype(np.float32)


_COSINES = _cosines()


def phash(small: Image.Image) -> int:
    """The 64-bit DCT hash (Zauner 2010, section 3.2.1): which low frequencies are above their median.

    Args:
        small: the whole picture at 64 x 64.
    """
    side = (_HASHED_PX, _HASHED_PX)
    light = np.asarray(small.convert("L").resize(side, Image.Resampling.BILINEAR), np.float32)
    waves = (_COSINES @ light @ _COSINES.T).ravel()
    median = np.partition(waves, _WAVES**2 // 2 - 1)[_WAVES**2 // 2 - 1]
    return int.from_bytes(np.packbits(waves > median).tobytes(), "big")


def thumbnail(small: Image.Image) -> bytes:
    """16 x 16 of lightness, then 8 x 8 of each colour difference (JPEG's YCbCr).

    Colour is coarser because encoders make it so: at full detail, a picture saved again as JPEG differs from itself by
    more than two pictures do that differ by an eyebrow.

    Args:
        small: the whole picture at 64 x 64.
    """
    side = (_LIGHT_PX, _LIGHT_PX)
    light, blue, red = small.resize(side, Image.Resampling.BILINEAR).convert("YCbCr").split()
    return light.tobytes() + blue.reduce(2).tobytes() + red.reduce(2).tobytes()
