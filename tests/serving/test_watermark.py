"""The mark in the pixels: it survives what happens to pictures, and is not seen where it is not."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from serving.watermark import FALSE_POSITIVES, Found, embed, find, too_small

PAYLOAD = "a1b2c3"


def photo(name: str, side: int = 256) -> Image.Image:
    """The middle of a photograph."""
    whole = Image.fromarray(load_sample_image(f"{name}.jpg"))
    left, top = (whole.width - side) // 2, (whole.height - side) // 2
    return whole.crop((left, top, left + side, top + side))


@pytest.fixture(scope="module")
def marked() -> Image.Image:
    return embed(photo("china"), PAYLOAD, 2.0)


def saved(image: Image.Image, kind: str, **options: object) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def psnr(a: Image.Image, b: Image.Image) -> float:
    error = np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2)
    return float(10 * np.log10(255**2 / error))


def test_a_mark_is_not_seen_and_is_found_with_what_it_says(marked: Image.Image) -> None:
    assert psnr(photo("china"), marked) > 38
    found = find(marked)
    assert (found.payload, found.scale) == (PAYLOAD, 1.0)
    assert found.false_positive < 1e-12
    assert marked == embed(photo("china"), PAYLOAD, 2.0), "the same input gives the same output"


@pytest.mark.parametrize("payload", ["000000", "ffffff", "000fff"])
def test_every_payload_reads_back(payload: str) -> None:
    assert find(embed(photo("flower"), payload, 2.0)).payload == payload


HARMED: dict[str, Callable[[Image.Image], Image.Image]] = {
    "jpeg 75": lambda image: saved(image, "JPEG", quality=75),
    "webp 80": lambda image: saved(image, "WEBP", quality=80),
    "cropped": lambda image: image.crop((17, 31, 217, 241)),
    "enlarged by a half": lambda image: image.resize((384, 384), Image.Resampling.BICUBIC),
    "shrunk to three quarters": lambda image: image.resize((192, 192), Image.Resampling.LANCZOS),
    "brighter": lambda image: image.point(lambda level: min(255, int(level * 1.2 + 10))),
}


@pytest.mark.parametrize("harm", HARMED)
def test_a_mark_survives(marked: Image.Image, harm: str) -> None:
    found = find(HARMED[harm](marked))
    assert found.payload == PAYLOAD
    assert found.false_positive <= FALSE_POSITIVES


def unmarked() -> dict[str, Image.Image]:
    ramp = np.tile(np.linspace(0, 255, 256, dtype=np.uint8), (256, 1))
    stripes = np.tile((np.arange(256) % 16 < 8).astype(np.uint8) * 255, (256, 1))
    noisy = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    return {
        "photo": photo("china"),
        "flat": Image.new("RGB", (256, 256), (40, 90, 200)),
        "ramp": Image.fromarray(ramp).convert("RGB"),
        "stripes at the mark's own period": Image.fromarray(stripes).convert("RGB"),
        "noise": Image.fromarray(noisy),
    }


@pytest.mark.parametrize("name", unmarked())
def test_no_mark_is_found_where_there_is_none(name: str) -> None:
    found = find(unmarked()[name])
    assert found.payload is None
    assert found.false_positive > FALSE_POSITIVES


def test_a_small_picture_is_said_to_be_too_small() -> None:
    assert too_small(256, 256) is None
    assert too_small(255, 1024) == "255x1024 pixels: a mark needs 256 on both sides to be found again"
    tiny = find(Image.new("RGB", (3, 2)))
    assert isinstance(tiny, Found)
    assert tiny.payload is None
