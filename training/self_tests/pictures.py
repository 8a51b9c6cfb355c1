"""A small data set, drawn here."""

from __future__ import annotations

import io
from pathlib import Path

from training import noise
from training.data.build import build
from training.data.config import BuildConfig

COUNT, SIDE = 30, 16


def pictures(folder: Path) -> Path:
    """Draw it, and build it as ``darkroom data build`` does; returns its place."""
    from PIL import Image

    source = folder / "drawn"
    source.mkdir()
    for number in range(COUNT):
        pixels = noise.generator(0, "self-test", number).integers(0, 256, (SIDE, SIDE, 3), dtype="uint8")
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        (source / f"{number:02d}.png").write_bytes(buffer.getvalue())
        (source / f"{number:02d}.txt").write_text(f"picture {number}")
    build(source, folder / "data", BuildConfig(held_out=0.2))
    return folder / "data"
