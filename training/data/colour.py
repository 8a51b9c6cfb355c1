"""Colour profiles: whatever a picture's numbers mean, they become sRGB."""

from __future__ import annotations

import io
import threading
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

_MAX_PROFILE_BYTES = 4_000_000
"""Larger profiles are ignored; the largest in use, of printing presses, have 2 MB."""
_SAME = 2
"""A profile that moves no colour by more than this many of 255 steps is sRGB by another name."""
_CACHED = 16
_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""The colour spaces of the formats that we read, and Pillow's mode for each."""
_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
_opening = threading.Lock()
"""Profiles are opened one at a time: LittleCMS promises threads no more than to share a finished transform."""


def is_srgb(profile: bytes | None, mode: str) -> bool:
    """Whether the numbers of a picture are sRGB as they are; without a profile they are taken for it.

    Args:
        profile: the ICC profile in the file.
        mode: the picture's, as Pillow names it.
    """
    return not profile or _transform(profile, _base(mode)) is None


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The picture as sRGB ``RGB`` or, where it has transparency, ``RGBA``.

    A profile that is damaged, or that is for another kind of picture, is ignored, as browsers do.

    Args:
        image: of 8 bits a channel.
        profile: its ICC profile.
    """
    transparent = image.has_transparency_data
    transform = _transform(profile, _base(image.mode)) if profile else None
    if transform is None:
        return image.convert("RGBA" if transparent else "RGB")
    colours = ImageCms.applyTransform(image.convert(_base(image.mode)).convert(transform.input_mode), transform)
    if colours is None:  # only with inPlace
        raise ValueError("the colour profile gave no picture")
    if transparent:
        colours.putalpha(image.convert("RGBA").getchannel("A"))
    return colours


def ignored(profile: bytes | None, mode: str) -> str:
    """Why a picture's profile is ignored, in words; ``""`` where there is none or it is used."""
    if not profile:
        return ""
    opened = _open(profile)
    if opened is None:
        return "its colour profile is damaged and was ignored"
    if not _fits(_space(opened), _base(mode)):
        return f"its colour profile is for {_space(opened).strip()[:4]}, not {_base(mode)}, and was ignored"
    return ""


def _base(mode: str) -> str:
    """The mode in which a picture's colours meet its profile; palettes hold RGB."""
    return "L" if mode in {"1", "L", "LA"} or mode.startswith("I") else "CMYK" if mode == "CMYK" else "RGB"


def _space(opened: ImageCms.ImageCmsProfile) -> str:
    return str(opened.profile.xcolor_space)


def _fits(space: str, base: str) -> bool:
    # grey pictures are often saved with the RGB profile of their editor: their grey then is that profile's grey axis
    return _MODES.get(space) == base or (space == "RGB " and base == "L")


@lru_cache(maxsize=_CACHED)
def _open(profile: bytes) -> ImageCms.ImageCmsProfile | None:
    if len(profile) > _MAX_PROFILE_BYTES:
        return None
    with _opening:
        try:
            return ImageCms.ImageCmsProfile(io.BytesIO(profile))
        except (OSError, ImageCms.PyCMSError):
            return None


@lru_cache(maxsize=_CACHED)
def _transform(profile: bytes, base: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where it is no use or changes nothing."""
    opened = _open(profile)
    if opened is None or not _fits(_space(opened), base):
        return None
    lattice = _lattice(_MODES[_space(opened)])
    with _opening:
        try:
            transform = ImageCms.buildTransform(opened, _SRGB, lattice.mode, "RGB", ImageCms.Intent.PERCEPTUAL)
            moved = ImageCms.applyTransform(lattice, transform)
        except ImageCms.PyCMSError:
            return None
    change = np.asarray(moved, np.int16) - np.asarray(lattice.convert("RGB"), np.int16)
    return None if np.abs(change).max() <= _SAME else transform


def _lattice(mode: str) -> Image.Image:
    """Colours all over a space: 9 steps along each axis."""
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(*[steps] * len(Image.new(mode, (1, 1)).getbands()), indexing="ij"), -1)
    return Image.frombytes(mode, (colours.size // colours.shape[-1], 1), colours.tobytes())
