"""Encoded bytes become pictures: one decoder for cleaning, looking and training."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageColor

from training.data.colour import ignored, is_srgb, to_srgb

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Pillow's decoders that we let near strangers' bytes; its others are rarer and have had more holes."""

JPEGS = ("JPEG", "MPO")
"""An MPO is a JPEG with more of them behind it, e.g. a camera's preview; every JPEG reader shows the first."""

RGB = tuple[int, int, int]

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation; all others are taken for upright."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What an encoded picture is.

    Attributes:
        width: pixels, once it is upright.
        height: pixels, once it is upright.
        kind: the file ending of its format, ``jpg`` for instance.
        direct: a sound JPEG whose decoded samples already are upright sRGB, so that the fastest decoder may have it.
        note: what was passed over in it, a damaged colour profile for instance.
    """

    width: int
    height: int
    kind: str
    direct: bool
    note: str = ""


def facts_of(header: Image.Image) -> Facts:
    """The facts of a picture whose header was read; of a PNG, all of it is: orientation may stand at its end."""
    orientation = _orientation(header)
    width, height = header.size
    if orientation in {5, 6, 7, 8}:  # turned by a quarter
        width, height = height, width
    kind, profile = str(header.format), header.info.get("icc_profile")
    plain = orientation not in _TURNS and header.mode in {"RGB", "L"} and is_srgb(profile, header.mode)
    ending = "jpg" if kind in JPEGS else kind.lower()
    return Facts(width, height, ending, kind in JPEGS and plain, ignored(profile, header.mode))


def stated_by(header: Image.Image) -> Facts:
    """What a header says, turned or not; nothing is decoded for it, as of a picture that is refused."""
    kind = str(header.format)
    return Facts(*header.size, "jpg" if kind in JPEGS else kind.lower(), direct=False)


def open_header(data: bytes) -> Image.Image:
    """The picture with its header read and no pixel decoded yet.

    Raises:
        Exception: whatever Pillow raises; the caller names the input and turns it into a refusal.
    """
    return Image.open(io.BytesIO(data), formats=FORMATS)


def background_rgb(name: str) -> RGB:
    """A colour's name or ``#rrggbb`` as red, green, blue in 0..255.

    Raises:
        ValueError: not a colour that Pillow knows.
    """
    return ImageColor.getrgb(name)[:3]


def decode(data: bytes, background: RGB) -> Image.Image:
    """The upright sRGB picture, transparency composited over ``background``; of an animation, the first frame.

    Raises:
        Exception: whatever Pillow raises for damaged bytes.
    """
    header = open_header(data)
    return finish(header, header, background)


def finish(header: Image.Image, pixels: Image.Image, background: RGB) -> Image.Image:
    """The rest of ``decode`` once the samples are there: 8 bits, sRGB, no transparency, upright, in this order.

    Colours become sRGB before they are laid over the background, which is sRGB already.

    Args:
        header: the picture as Pillow opened it.
        pixels: its samples: ``header`` itself, or what another decoder made of the same bytes.
        background: the colour behind transparent pixels.

    Returns:
        In mode ``RGB``.
    """
    profile = header.info.get("icc_profile")
    pixels.load()  # some of a PNG's facts stand behind its pixels
    picture = to_srgb(_eight_bits(pixels) if pixels.mode.startswith("I;16") else pixels, profile)
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (*background, 255)), picture).convert("RGB")
    turn = _TURNS.get(_orientation(header))
    return picture if turn is None else picture.transpose(turn)


def _orientation(header: Image.Image) -> int:
    value = header.getexif().get(_ORIENTATION)
    return value if isinstance(value, int) else 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit, which Pillow would clip to 255 instead of scaling; the one transparent grey is kept."""
    grey = np.asarray(image)
    scaled = Image.fromarray((grey >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        scaled.putalpha(Image.fromarray(np.where(grey == transparent, 0, 255).astype(np.uint8)))
    return scaled


def decode_jpeg(data: bytes, *, grey: bool) -> Image.Image:
    """A JPEG's samples by the fastest decoder, strictly: what libjpeg only warns of and fills with grey is an error.

    Pillow throws libjpeg's warnings away. Bytes that belong to no pixel before the end mark are such a warning too:
    they cannot be told from a damaged middle. The samples equal Pillow's, as both are libjpeg-turbo.

    Args:
        data: the encoded picture.
        grey: decode the lightness only.

    Returns:
        In mode ``L`` or ``RGBX``, which shares its memory with the decoder's array.

    Raises:
        ValueError: damaged.
    """
    mode = "L" if grey else "RGBX"
    samples = simplejpeg.decode_jpeg(data, colorspace="GRAY" if grey else "RGBX", strict=True)
    size = samples.shape[1], samples.shape[0]
    return Image.frombuffer(mode, size, samples, "raw", mode, 0, 1)


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
