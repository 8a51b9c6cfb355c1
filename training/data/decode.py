"""Encoded bytes become pictures: one decoder for cleaning, looking and training."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image, ImageColor, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Pillow's decoders that we let near strangers' bytes; its others are rarer and have had more holes."""


def open_header(data: bytes) -> Image.Image:
    """The picture with its header read and no pixel decoded yet.

    Raises:
        Exception: whatever Pillow raises; the caller names the input and turns it into a refusal.
    """
    return Image.open(io.BytesIO(data), formats=FORMATS)


def background_rgb(name: str) -> tuple[int, int, int]:
    """A colour's name or ``#rrggbb`` as red, green, blue in 0..255.

    Raises:
        ValueError: not a colour that Pillow knows.
    """
    return ImageColor.getrgb(name)[:3]


def decode(data: bytes, background: tuple[int, int, int]) -> Image.Image:
    """The upright RGB picture, transparency composited over ``background``; of an animation, the first frame.

    Raises:
        Exception: whatever Pillow raises for damaged bytes.
    """
    image = ImageOps.exif_transpose(open_header(data))
    if image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    picture = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, (*background, 255)), picture).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit, which Pillow would clip to 255 instead of scaling; the one transparent grey is kept."""
    grey = np.asarray(image)
    scaled = Image.fromarray((grey >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        scaled.putalpha(Image.fromarray(np.where(grey == transparent, 0, 255).astype(np.uint8)))
    return scaled


def require_sound_jpeg(data: bytes) -> None:
    """Decode a JPEG strictly: what libjpeg only warns of and fills with grey is an error here.

    Pillow throws libjpeg's warnings away. Bytes that belong to no pixel before the end mark are such a warning too:
    they cannot be told from a damaged middle.

    Raises:
        ValueError: damaged.
    """
    simplejpeg.decode_jpeg(data, colorspace="GRAY", strict=True)


def square(picture: Image.Image, side: int) -> np.ndarray:
    """The centre square of an RGB picture, resized with Lanczos (antialiased: its support grows with the reduction).

    Transparency is gone by now, so that no hidden colour bleeds into the edges.

    Returns:
        ``[side, side, 3]`` uint8.
    """
    edge = min(picture.size)
    left, top = (picture.width - edge) / 2, (picture.height - edge) / 2
    if picture.size != (side, side):
        box = (left, top, left + edge, top + edge)
        picture = picture.resize((side, side), Image.Resampling.LANCZOS, box=box)
    return np.array(picture)
