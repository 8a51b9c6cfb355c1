"""What cleaning measured of a picture: for the ledger, and for the rules over the whole set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Measures:
    """What was measured before a rule ended the judgement; None where it was not.

    Attributes:
        phash: 64-bit perceptual hash.
        thumbnail: the small colour picture by which near duplicates are verified, raw bytes.
        sharpness: variance of the Laplacian at the working size.
        spread: the largest standard deviation of a channel, in steps of 0..255.
        unsafe: Open-NSFW's score in 0..1.
        features: float16, of the feature network.
        caption_match: cosine between caption and picture.
    """

    phash: int | None = None
    thumbnail: bytes | None = None
    sharpness: float | None = None
    spread: float | None = None
    unsafe: float | None = None
    features: np.ndarray | None = None
    caption_match: float | None = None
