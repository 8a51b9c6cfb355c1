"""A small data set for runs that are killed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data.build import BuildConfig, build


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty patches of colour, an eighth of them held out."""
    folder, out = tmp_path_factory.mktemp("patches"), tmp_path_factory.mktemp("data") / "patches"
    noise = np.random.Generator(np.random.Philox(key=11))
    for number in range(40):
        pixels = noise.integers(0, 256, size=(24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"patch number {number}")
    build(folder, out, BuildConfig(held_out=0.125))
    return out
