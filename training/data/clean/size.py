"""Sizes: encoded bytes, pixels before anything is decoded, the shorter side, the shape."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from training.data.findings import Finding


class SizeConfig(BaseModel):
    """How large a picture may and must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_side_px: int = Field(default=16, ge=1)
    """A picture whose shorter side is smaller is dropped."""
    max_pixels: int = Field(default=64_000_000, ge=1, le=89_478_485)
    """A picture whose header states more pixels is dropped before decoding; the ceiling is Pillow's own bomb limit."""
    max_bytes: int = Field(default=64_000_000, ge=1)
    """An encoded picture with more bytes is dropped unread."""
    max_aspect: float = Field(default=8.0, ge=1.0)
    """A picture whose longer side is more than this many times its shorter one is dropped: banners, rulers, spacers."""


def too_many_bytes(size: int, config: SizeConfig) -> Finding | None:
    """Encoded bytes over ``max_bytes``."""
    if size <= config.max_bytes:
        return None
    return Finding("too_many_bytes", size, config.max_bytes, f"{size} bytes > {config.max_bytes}")


def too_many_pixels(width: int, height: int, config: SizeConfig) -> Finding | None:
    """A decompression bomb, or a picture larger than wanted."""
    pixels = width * height
    if pixels <= config.max_pixels:
        return None
    return Finding("too_many_pixels", pixels, config.max_pixels, f"{width}x{height} pixels > {config.max_pixels}")


def too_small(width: int, height: int, config: SizeConfig) -> Finding | None:
    """The shorter side under ``min_side_px``."""
    side = min(width, height)
    if side >= config.min_side_px:
        return None
    return Finding("too_small", side, config.min_side_px, f"{width}x{height}: shorter side < {config.min_side_px}")


def extreme_aspect(width: int, height: int, config: SizeConfig) -> Finding | None:
    """The longer side over ``max_aspect`` times the shorter one."""
    aspect = max(width, height) / max(1, min(width, height))
    if aspect <= config.max_aspect:
        return None
    return Finding("extreme_aspect", aspect, config.max_aspect, f"{width}x{height}: {aspect:.1f} to 1")
