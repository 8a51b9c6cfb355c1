"""Damage and traps in the encoded bytes: what cannot be read, what was cut, what unpacks into far more."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

from PIL import Image, PngImagePlugin, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field

from training.data.clean.frames import frames_of, scans_of
from training.data.decode import FORMATS, JPEGS, RGB, Facts, decode_jpeg, facts_of, finish, open_header
from training.data.findings import Finding, RefusedError, describe

_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_CUT = ("truncated", "premature end", "not enough data", "unexpected end")
_UNPACKS = re.compile(r"(\d+)>MAX_TEXT_MEMORY|MAX_TEXT_CHUNK")


class DecodingConfig(BaseModel):
    """Which encoded pictures count as sound."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    strict_jpeg: bool = True
    """Drop a JPEG that libjpeg only warns of and fills with grey; bytes before the end mark are such a warning too."""
    max_scans: int = Field(default=100, ge=1)
    """A JPEG with more scans is dropped before decoding, as each costs a pass over all pixels; usual are 1 to 10."""
    animations: Literal["first", "refuse"] = "first"
    """What becomes of a picture with several frames: its first one counts, or it is dropped."""
    max_frames: int = Field(default=1_000, ge=1)
    """A picture with more frames is dropped: only its first is shown, yet every reader carries all of them."""


def opened(data: bytes, max_pixels: int) -> Image.Image:
    """The picture with its header read.

    Args:
        data: the encoded picture.
        max_pixels: what the finding names where even the header is a bomb.

    Raises:
        RefusedError: ``undecodable``, ``too_many_pixels`` or ``unpacks_too_far``.
    """
    try:
        return open_header(data)
    except _BOMBS as error:
        stated = re.search(r"\((\d+) pixels\)", str(error))
        value = float(stated.group(1)) if stated else None
        raise RefusedError(Finding("too_many_pixels", value, max_pixels, describe(error))) from error
    except UnidentifiedImageError as error:
        raise RefusedError(Finding("undecodable", detail=f"no readable header of {', '.join(FORMATS)}")) from error
    except Exception as error:
        raise RefusedError(_unpacking(error) or Finding("undecodable", detail=describe(error))) from error


def too_many_scans(data: bytes, header: Image.Image, config: DecodingConfig) -> Finding | None:
    """A progressive JPEG that costs more passes than any encoder makes."""
    scans = scans_of(data, header) if header.format in JPEGS else 0
    if scans <= config.max_scans:
        return None
    return Finding("too_many_scans", scans, config.max_scans, f"{scans} scans > {config.max_scans}")


def animated(data: bytes, header: Image.Image, config: DecodingConfig) -> Finding | None:
    """Several frames where none are wanted, or more than ``max_frames``."""
    frames = frames_of(data, header, config.max_frames + 1)
    if frames > 1 and config.animations == "refuse":
        return Finding("animated", frames, 1, f"{_counted(frames, config)} frames; only still pictures are wanted")
    if frames > config.max_frames:
        return Finding("too_many_frames", frames, config.max_frames, f"{_counted(frames, config)} frames")
    return None


def _counted(frames: int, config: DecodingConfig) -> str:
    return f"more than {config.max_frames}" if frames > config.max_frames else str(frames)


def decoded(data: bytes, header: Image.Image, background: RGB, config: DecodingConfig) -> tuple[Image.Image, Facts]:
    """The picture, decoded once and checked for all damage that decoding shows, and what it is.

    Call it after the pixel limit.

    Args:
        data: the encoded picture.
        header: what ``opened`` returned for it.
        background: the colour behind transparent pixels.
        config: how strict to be.

    Returns:
        A picture in mode ``RGB``, ``RGBX`` or ``L``.

    Raises:
        RefusedError: ``truncated``, ``corrupt``, ``damaged_jpeg`` or ``unpacks_too_far``.
    """
    try:
        if header.format in JPEGS:
            return _jpeg(data, header, background, config)
        if header.format == "PNG":
            open_header(data).verify()  # the checksums, which decoding does not look at
        return finish(header, header, background), facts_of(header)
    except RefusedError:
        raise
    except Exception as error:
        cut = any(word in str(error).lower() for word in _CUT)
        plain = Finding("truncated" if cut else "corrupt", detail=describe(error))
        raise RefusedError(_unpacking(error) or plain) from error


def _jpeg(data: bytes, header: Image.Image, background: RGB, config: DecodingConfig) -> tuple[Image.Image, Facts]:
    try:
        samples = decode_jpeg(data, grey=header.mode != "RGB")
    except ValueError as error:
        picture = finish(header, header, background)  # what Pillow refuses too is truncated or corrupt
        if config.strict_jpeg:
            detail = f"{describe(error)}; it would be kept without strict_jpeg"
            raise RefusedError(Finding("damaged_jpeg", detail=detail)) from error
        return picture, replace(facts_of(header), direct=False)
    facts = facts_of(header)
    if facts.direct:
        return samples, facts
    # inks are left to Pillow: of them the fast decoder only gave the lightness, to vouch for the bytes
    return finish(header, samples if header.mode in {"RGB", "L"} else header, background), facts


def _unpacking(error: Exception) -> Finding | None:
    """A compressed text or colour profile that unpacks into more than Pillow lets it."""
    found = _UNPACKS.search(str(error)) if isinstance(error, ValueError) else None
    if found is None:
        return None
    total = found.group(1)
    value, limit = (float(total), PngImagePlugin.MAX_TEXT_MEMORY) if total else (None, PngImagePlugin.MAX_TEXT_CHUNK)
    return Finding("unpacks_too_far", value, limit, describe(error))
