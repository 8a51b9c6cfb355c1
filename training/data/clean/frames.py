"""Frames of animations and scans of JPEGs, counted without decoding any."""

from __future__ import annotations

from PIL import Image

_GIF_HEADER = 13
_GIF_EXTENSION, _GIF_IMAGE = 0x21, 0x2C
_JPEG_START_OF_SCAN = b"\xff\xda"


def frames_of(data: bytes, header: Image.Image, limit: int) -> int:
    """How many frames a picture has; counting stops at ``limit``.

    A camera's preview behind a JPEG is no frame.

    Args:
        data: the encoded picture.
        header: the same, opened by Pillow.
        limit: at least 1.
    """
    if header.format == "GIF":  # Pillow would decode its way through all of them
        return max(1, min(limit, _gif_frames(data, limit)))
    if header.format not in {"PNG", "WEBP"}:
        return 1
    return min(limit, int(getattr(header, "n_frames", 1)))


def _gif_frames(data: bytes, limit: int) -> int:
    at = _GIF_HEADER + _table(data[10:11])
    frames = 0
    while at < len(data) and frames < limit:
        if data[at] == _GIF_EXTENSION:
            at = _behind_blocks(data, at + 2)
        elif data[at] == _GIF_IMAGE:
            frames += 1
            at = _behind_blocks(data, at + 11 + _table(data[at + 9 : at + 10]))
        else:  # the end mark, or damage
            break
    return frames


def _table(flags: bytes) -> int:
    """Bytes of the colour table that these flags announce."""
    return 3 << (flags[0] % 8 + 1) if flags and flags[0] & 0x80 else 0


def _behind_blocks(data: bytes, at: int) -> int:
    """The place behind a chain of blocks, each with its length before it, the last of length 0."""
    while at < len(data) and data[at]:
        at += 1 + data[at]
    return at + 1


def scans_of(data: bytes, header: Image.Image) -> int:
    """How many scans a JPEG has, counted from its first one on; 0 where there is none.

    Within a scan's data the mark cannot occur; before the first scan it could, in a profile or a preview.

    Args:
        data: the encoded picture.
        header: the same, opened by Pillow.
    """
    at = 2
    while data[at : at + 1] == b"\xff" and data[at : at + 2] != _JPEG_START_OF_SCAN:
        filler = data[at + 1 : at + 2] == b"\xff"
        at += 1 if filler else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    whole = data[at + 4 : at + 5] == bytes([len(header.getbands())])
    if whole and not header.info.get("progressive"):
        return 1  # all components at once: decoders refuse another
    return data.count(_JPEG_START_OF_SCAN, at)
