"""Pictures to judge, drawn and encoded."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def scene(width: int = 640, height: int = 480, seed: int = 0) -> Image.Image:
    """Rectangles, discs and a gradient: edges at every scale, as in a photograph."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32) / height
    pixels = np.stack([rows, columns / 2, 1 - rows], -1) * 120 + 40
    for _ in range(60):
        x, y, size = rng.random(3) * [width / height, 1, 0.25]
        inside = (np.abs(columns - x) < size) & (np.abs(rows - y) < size / 2)
        disc = (columns - x) ** 2 + (rows - y) ** 2 < size**2 / 4
        pixels[inside if rng.random() < 0.5 else disc] = rng.random(3) * 255
    return Image.fromarray(pixels.astype(np.uint8))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_chunk(png: bytes, name: bytes, data: bytes, *, at_end: bool = False) -> bytes:
    at = len(png) - 12 if at_end else 33
    return png[:at] + chunk(name, data) + png[at:]
