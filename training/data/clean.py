"""The rules that an input must pass: each a small pure function of what it judges and the config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from training.data.decode import FORMATS, decode, open_header, require_sound_jpeg

_JPEGS = ("JPEG", "MPO")
"""An MPO is a JPEG with more of them behind it, e.g. a camera's preview; every JPEG reader shows the first."""

Rule = Literal[
    "too_many_bytes",
    "too_many_pixels",
    "too_small",
    "undecodable",
    "truncated",
    "corrupt",
    "unreadable",
    "unsafe_name",
    "not_a_file",
    "duplicate_name",
    "outside_source",
    "missing_file",
    "bad_row",
    "duplicate_row",
    "bad_sidecar",
    "sidecar_without_image",
    "damaged_tar",
]
"""Why an input was dropped; the ledger names one of these."""


class CleanConfig(BaseModel):
    """What a picture must be to be kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_side_px: int = Field(default=16, ge=1)
    """A picture whose shorter side is smaller is dropped."""
    max_pixels: int = Field(default=64_000_000, ge=1, le=89_478_485)
    """A picture whose header states more pixels is dropped before decoding; the ceiling is Pillow's own bomb limit."""
    max_bytes: int = Field(default=64_000_000, ge=1)
    """An encoded picture with more bytes is dropped unread."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Why an input is refused.

    Attributes:
        rule: the rule's name.
        value: what was found.
        threshold: what would have been accepted.
        detail: the reason in words.
    """

    rule: Rule
    value: int | str | None = None
    threshold: int | str | None = None
    detail: str = ""


class RefusedError(Exception):
    """An input cannot be used; never leaves ``training.data``, it becomes a line of the ledger."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.detail or finding.rule)
        self.finding = finding


def too_many_bytes(size: int, config: CleanConfig) -> Finding | None:
    """Encoded bytes over ``max_bytes``."""
    if size <= config.max_bytes:
        return None
    return Finding("too_many_bytes", size, config.max_bytes, f"{size} bytes > {config.max_bytes}")


def too_many_pixels(width: int, height: int, config: CleanConfig) -> Finding | None:
    """A decompression bomb, or a picture larger than wanted."""
    pixels = width * height
    if pixels <= config.max_pixels:
        return None
    return Finding("too_many_pixels", pixels, config.max_pixels, f"{width}x{height} pixels > {config.max_pixels}")


def too_small(width: int, height: int, config: CleanConfig) -> Finding | None:
    """The shorter side under ``min_side_px``."""
    side = min(width, height)
    if side >= config.min_side_px:
        return None
    return Finding("too_small", side, config.min_side_px, f"{width}x{height}: shorter side < {config.min_side_px}")


def undecodable(data: bytes, kind: str) -> Finding | None:
    """Damage that only decoding shows: a cut file, a wrong checksum, a broken stream.

    Call it after the pixel limit: it decodes everything.

    Args:
        data: the encoded picture.
        kind: its format, as Pillow names it.
    """
    try:
        open_header(data).verify()
        decode(data, (255, 255, 255))
        if kind in _JPEGS:
            require_sound_jpeg(data)
    except Exception as error:  # noqa: BLE001 - decoders raise nearly anything for hostile bytes; the ledger names it
        cut = any(word in str(error).lower() for word in ("truncated", "premature end"))
        return Finding("truncated" if cut else "corrupt", detail=describe(error))
    return None


def judge(data: bytes, config: CleanConfig) -> tuple[Finding | None, str]:
    """All rules about one encoded picture, the cheap ones first.

    Returns:
        The first finding, if any, and the format's usual file ending (``""`` if there is none).
    """
    try:
        header = open_header(data)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return Finding("too_many_pixels", None, config.max_pixels, describe(error)), ""
    except Exception as error:  # noqa: BLE001 - as above
        return Finding("undecodable", None, " ".join(FORMATS), describe(error)), ""
    width, height = header.size
    kind = str(header.format)
    finding = too_many_pixels(width, height, config) or too_small(width, height, config) or undecodable(data, kind)
    return finding, "jpg" if kind in _JPEGS else kind.lower()


def describe(error: BaseException) -> str:
    """An exception in one short line, without memory addresses, which would differ between builds."""
    text = str(error).split("<_io.")[0].strip()
    return f"{type(error).__name__}: {text}"[:200]
