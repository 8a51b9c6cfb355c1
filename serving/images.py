"""Pictures to bytes, with the words inside that say how they were made, and those words out of strangers' bytes."""

from __future__ import annotations

import html
import io
import logging
import re
import struct
from dataclasses import dataclass
from typing import Literal
from xml.sax.saxutils import quoteattr

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from serving.infotext import KEY

OutputFormat = Literal["png", "webp", "jpeg"]
"""What a picture can be sent as."""
PARAMETERS_KEY = "darkroom"
"""The PNG text chunk that holds the parameters, as JSON."""
MAX_WORDS_BYTES = 1_000_000
"""Longer words inside a stranger's file are not read."""
_SEGMENT_BYTES = 65_000
"""What one segment of a JPEG holds."""
_COMMENT_CODE = b"UNICODE\0"
_LONG, _UNDEFINED = 4, 7
"""Types of TIFF's values."""
_XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:darkroom="urn:darkroom:picture:1" darkroom:parameters={}/>'
    "</rdf:RDF></x:xmpmeta>"
)
_XMP_PARAMETERS = re.compile(r"""darkroom:parameters=("[^"]*"|'[^']*')""")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Words:
    """What a file says of its picture.

    Attributes:
        json: the parameters as JSON; empty where it has none.
        infotext: the same in the A1111 UI's words; empty where it has none.
    """

    json: str = ""
    infotext: str = ""


def encode_image(
    image: Image.Image, output_format: OutputFormat, words: Words | None = None, *, quality: int | None = None
) -> bytes:
    """The file's bytes; the same input gives the same bytes.

    Args:
        image: RGB picture.
        output_format: what file to make.
        words: what it says about itself: in a PNG text chunks; else XMP and, as the A1111 UI does, EXIF's UserComment.
        quality: of a lossy file, 0..100; None is lossless for WebP and 95 for JPEG. A PNG has none.
    """
    buffer = io.BytesIO()
    if output_format == "png":
        info = PngInfo()
        if words is not None:
            info.add_itxt(PARAMETERS_KEY, words.json)
            info.add_itxt(KEY, words.infotext)
        image.save(buffer, "PNG", pnginfo=info)
        return buffer.getvalue()
    told = {} if words is None else _segments(words)
    if output_format == "webp":
        image.save(buffer, "WEBP", lossless=quality is None, quality=80 if quality is None else quality, **told)
    else:
        image.save(buffer, "JPEG", quality=95 if quality is None else quality, **told)
    return buffer.getvalue()


def read_words(header: Image.Image) -> Words:
    """What a picture's file says of it; damaged or endless words are none.

    Args:
        header: as ``serving.uploads.checked_header`` gives it: no pixel is decoded.
    """
    if header.format == "PNG":
        return Words(_text(header.info.get(PARAMETERS_KEY)), _text(header.info.get(KEY)))
    return Words(_from_xmp(header.info.get("xmp")), _comment(header))


def _segments(words: Words) -> dict[str, bytes]:
    """Pillow's arguments for XMP and EXIF; what is too long for a JPEG is left out, and said in the log."""
    told = {
        "exif": _exif(_COMMENT_CODE + words.infotext.encode("utf-16-be")),
        "xmp": _XMP.format(quoteattr(words.json)).encode(),
    }
    for name, segment in told.items():
        if len(segment) > _SEGMENT_BYTES:
            log.warning("a picture's %s of %d bytes is left out: a segment holds fewer", name, len(segment))
    return {name: segment for name, segment in told.items() if len(segment) <= _SEGMENT_BYTES}


def _exif(comment: bytes) -> bytes:
    """EXIF with nothing but a UserComment; by hand, as Pillow would make it a BYTE, which that UI does not read."""
    directory, comments = 8, 26  # offsets of two directories of one entry each
    pointer = struct.pack(">HHHIII", 1, ExifTags.IFD.Exif, _LONG, 1, comments, 0)
    entry = struct.pack(">HHHIII", 1, ExifTags.Base.UserComment, _UNDEFINED, len(comment), comments + len(pointer), 0)
    return b"Exif\0\0MM\0*" + struct.pack(">I", directory) + pointer + entry + comment


def _comment(header: Image.Image) -> str:
    """EXIF's UserComment, as text."""
    try:
        comment = header.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    except Exception:  # noqa: BLE001  # Pillow's many errors for a stranger's damaged EXIF
        return ""
    if not isinstance(comment, bytes) or len(comment) > MAX_WORDS_BYTES:
        return ""
    code, text = comment[:8], comment[8:]
    if code == _COMMENT_CODE:
        return text.decode("utf-16-be", errors="replace")
    return text.decode("ascii", errors="replace") if code == b"ASCII\0\0\0" else ""


def _from_xmp(packet: object) -> str:
    """Our own property out of an XMP packet; no XML parser sees a stranger's entities."""
    if not isinstance(packet, bytes) or len(packet) > MAX_WORDS_BYTES:
        return ""
    found = _XMP_PARAMETERS.search(packet.decode(errors="replace"))
    return html.unescape(found[1][1:-1]) if found else ""


def _text(value: object) -> str:
    return value if isinstance(value, str) and len(value) <= MAX_WORDS_BYTES else ""
