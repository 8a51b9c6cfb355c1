"""A tiny recipe and a small data set, made once."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training.data.build import BuildConfig, build

TINY = Path(__file__).parent / "tiny.yaml"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 pictures with captions beside them."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.Generator(np.random.Philox(key=7))
    for number in range(40):
        colour = noise.integers(0, 256, size=3)
        pixels = np.clip(colour + noise.integers(-40, 40, size=(24, 24, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"patch number {number}")
    return folder


@pytest.fixture(scope="session")
def small_data(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures as a data set with held-out ones."""
    out = tmp_path_factory.mktemp("data") / "small"
    build(pictures, out, BuildConfig(held_out=0.2))
    return out


@pytest.fixture(scope="session")
def train(darkroom: Callable[..., subprocess.CompletedProcess[str]], small_data: Path) -> Callable[..., Any]:
    """``train("--set", "name=a")``: trains the tiny recipe; the outcome, with the progress under ``log``."""

    def run(*argv: str) -> dict[str, Any]:
        done = darkroom("train", TINY, "--data", small_data, "--json", *argv, timeout_s=280)
        assert done.returncode == 0, done.stderr
        return {**json.loads(done.stdout), "log": done.stderr}

    return run
