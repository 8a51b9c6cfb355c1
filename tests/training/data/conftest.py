import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data.build import build
from training.data.config import BuildConfig

Encode = Callable[..., bytes]


@pytest.fixture(scope="session")
def encode() -> Encode:
    """A real picture, different for every number."""

    def encoded(number: int = 0, size: tuple[int, int] = (24, 24), kind: str = "PNG", mode: str = "RGB") -> bytes:
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind)
        return buffer.getvalue()

    return encoded


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory, encode: Encode) -> Path:
    """A folder of 40 good pictures with sidecars of both kinds."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(40):
        kind, ending = [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")][number % 3]
        (folder / f"p{number:02d}.{ending}").write_bytes(encode(number, kind=kind))
        if number % 2:
            (folder / f"p{number:02d}.txt").write_text(f" number \n {number} ")
        else:
            facts = {"caption": f"number {number}", "licence": "MIT", "n": number}
            (folder / f"p{number:02d}.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """The data set of ``pictures``; tests that change it must copy it."""
    out = tmp_path_factory.mktemp("sets") / "numbers"
    build(pictures, out, BuildConfig(held_out=0.2))
    return out


@pytest.fixture(scope="session")
def write_tar() -> Callable[..., Path]:
    """Write members (name, bytes) or ready-made headers into a tar."""

    def write(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
        with tarfile.open(path, "w") as archive:
            for name, data in members:
                header = tarfile.TarInfo(name) if isinstance(name, str) else name
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))
        return path

    return write
