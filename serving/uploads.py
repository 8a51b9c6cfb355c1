"""Pictures that clients send: decoded within limits, fitted to the model, never trusted."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

from PIL import Image, ImageChops, ImageOps

from serving.errors import RequestError
from serving.schemas import StartImage
from training.data.decode import decode, open_header
from training.errors import UsageError

MAX_UPLOAD_BYTES = 20_000_000
"""Of one encoded picture."""
MAX_UPLOAD_PIXELS = 16_000_000
"""Of one picture, as its header states them, before anything is decoded."""
_DECODERS = ThreadPoolExecutor(2, "decode")
"""Few: a picture of the largest size takes some 200 MB while it is decoded."""

P = ParamSpec("P")
T = TypeVar("T")


async def beside_loop(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What ``work`` returns or raises, on a thread for pictures: the event loop goes on meanwhile."""
    known = partial(copy_context().run, work, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_DECODERS, known)


def from_base64(text: str, *, param: str) -> bytes:
    """The bytes of a picture inside JSON, with or without ``data:...;base64,`` before it; line breaks are passed over.

    Raises:
        RequestError: not base64.
    """
    body = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refused(param, f"{len(text)} characters", "a picture in base64") from error


def read_picture(data: bytes, *, param: str, size: tuple[int, int]) -> tuple[Image.Image, Image.Image | None]:
    """A picture fitted to the model, and its transparency.

    Args:
        data: the encoded picture; its kind is told by its bytes, whatever the client says.
        param: the request's field, for errors.
        size: width and height of the images to make, in pixels, which the model allows; the picture's centre is cut
            to it.

    Returns:
        RGB over white, and the alpha channel (mode ``L``) where it has one.

    Raises:
        RequestError: too large, of an unknown kind, or damaged.
    """
    header = checked_header(data, param=param)
    try:
        picture = decode(data, (255, 255, 255))
        alpha = _alpha(data, picture) if header.has_transparency_data else None
    except Exception as error:
        raise _refused(param, "a picture that cannot be decoded", "an undamaged picture") from error
    return _fitted(picture, size), None if alpha is None else _fitted(alpha, size)


def read_whole(data: bytes, *, param: str) -> Image.Image:
    """A picture as it is: upright, RGB, over white.

    Raises:
        RequestError: too large, of an unknown kind, or damaged.
    """
    checked_header(data, param=param)
    try:
        return decode(data, (255, 255, 255))
    except Exception as error:
        raise _refused(param, "a picture that cannot be decoded", "an undamaged picture") from error


def checked_header(data: bytes, *, param: str) -> Image.Image:
    """A picture whose header was read and keeps the limits; no pixel is decoded yet.

    Raises:
        RequestError: too large, or of an unknown kind.
    """
    if len(data) > MAX_UPLOAD_BYTES:
        raise _refused(param, f"{len(data)} bytes", f"at most {MAX_UPLOAD_BYTES} bytes")
    try:
        header = open_header(data)
    except Exception as error:
        rule = "a PNG, JPEG, WebP, GIF or BMP"
        raise _refused(param, f"{len(data)} bytes that are no picture", rule) from error
    width, height = header.size
    if width * height > MAX_UPLOAD_PIXELS:
        raise _refused(param, f"{width}x{height} pixels", f"at most {MAX_UPLOAD_PIXELS} pixels")
    return header


def start_image(
    picture: tuple[Image.Image, Image.Image | None], mask: Image.Image | None, strength: float
) -> StartImage:
    """What an edit starts from.

    Args:
        picture: as ``read_picture`` gives it.
        mask: mode ``L``, white where the picture may change; None lets all of it change.
        strength: how much of the way from noise is taken; 1 forgets the picture.
    """
    return StartImage(picture[0], strength, None if mask is None else two_levels(mask))


def two_levels(mask: Image.Image) -> Image.Image:
    """Grey to black or white."""
    return mask.point(lambda level: 255 * (level >= 128))


def _alpha(data: bytes, over_white: Image.Image) -> Image.Image:
    """What of the picture hides its background, by one decoder for all of the ways to say so."""
    shown = ImageChops.difference(over_white, decode(data, (0, 0, 0)))
    return ImageChops.invert(shown).getchannel("G")


def _fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)


def _refused(param: str, value: str, rule: str) -> RequestError:
    return RequestError(UsageError(f"Invalid value for '{param}'.", value=value, rule=rule), param=param)
