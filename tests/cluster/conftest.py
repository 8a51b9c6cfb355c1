"""A few pictures, and a data set of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of 12 pictures with captions beside them."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", (16, 16), (20 * number, 90, 200)).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"patch number {number}")
    return folder
