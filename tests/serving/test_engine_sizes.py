"""The engine with pictures of several sizes: which it makes, and that they do not depend on one another."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from serving.config import BatchConfig
from serving.engine import Engine
from serving.errors import RequestError
from serving.schemas import GenerationRequest, ImageReady, StartImage
from serving.sizes import Sizes
from training.canvas import Canvas
from training.objectives import Denoiser

SIZES = Sizes(((8, 8),), multiple=2, max_pixels=256)
BATCH = BatchConfig(padded_rows=4, max_waiting_images=32)


def request(width: int, height: int, seed: int = 1, **fields: Any) -> GenerationRequest:
    asked = {"prompt": "a red circle", "steps": 3, "guidance_scale": 2.5, **fields}
    return GenerationRequest(width=width, height=height, seed=seed, **asked)


def made(denoiser: Denoiser, encoder: Any, *wanted: GenerationRequest, batch: BatchConfig = BATCH) -> list[np.ndarray]:
    """The pictures of requests that come at once."""

    async def picture(engine: Engine, one: GenerationRequest) -> np.ndarray:
        async with aclosing(engine.submit(one)) as events:
            found = [np.asarray(event.image) async for event in events if isinstance(event, ImageReady)]
        return found[0]

    async def main() -> list[np.ndarray]:
        async with Engine(denoiser, encoder, canvas=Canvas(8), config=batch, sizes=SIZES) as engine:
            return await asyncio.gather(*(picture(engine, one) for one in wanted))

    return asyncio.run(asyncio.wait_for(main(), 60))


def test_pictures_of_several_sizes_are_made_at_once_and_each_is_as_it_is_alone(
    denoiser: Denoiser, encoder: Any
) -> None:
    sizes = [(8, 8), (16, 8), (8, 16), (12, 10)]
    wanted = [request(*size, seed=seed) for seed in (1, 2, 3) for size in sizes]
    together = made(denoiser, encoder, *wanted)
    assert [picture.shape[:2] for picture in together[:4]] == [(8, 8), (8, 16), (16, 8), (10, 12)]
    for one, found in zip(wanted[:4], together, strict=False):
        assert np.array_equal(made(denoiser, encoder, one)[0], found)


def test_a_picture_to_start_from_has_the_size_of_the_request(denoiser: Denoiser, encoder: Any) -> None:
    given = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8))
    mask = Image.new("L", (16, 8))
    mask.paste(255, (0, 0, 8, 8))
    (edited,) = made(denoiser, encoder, request(16, 8, start=StartImage(given, 0.9, mask)))
    assert np.array_equal(edited[:, 8:], np.asarray(given)[:, 8:])
    assert not np.array_equal(edited[:, :8], np.asarray(given)[:, :8])


def test_the_width_of_a_call_is_measured_where_none_is_given(denoiser: Denoiser, encoder: Any) -> None:
    measured = BatchConfig(max_batch_rows=2)
    (found,) = made(denoiser, encoder, request(8, 8), batch=measured)
    widths = [made(denoiser, encoder, request(8, 8), batch=BatchConfig(padded_rows=rows))[0] for rows in (1, 2)]
    assert any(np.array_equal(found, each) for each in widths)


@pytest.mark.parametrize(
    ("sizes", "wished", "text"),
    [
        (Sizes.only(8), (16, 8), ["This model makes images of 8x8 pixels.", "16x8", "options: 8x8, auto"]),
        (
            Sizes(((8, 8), (16, 4))),
            (16, 16),
            ["images of 8x8, 16x4 pixels", "a size that the model was trained at", "options: 8x8, 16x4, auto"],
        ),
        (SIZES, (9, 8), ["multiples of 2, and at most 256 pixels", "options: 8x8, auto"]),
        (SIZES, (64, 64), ["'64x64'", "options: 16x16, 8x8, auto"]),
        (SIZES, (400, 4), ["'400x4'", "auto"]),
        (Sizes(((8, 8),), 2, 16, 4096), (64, 32), ["each at most 16", "options: 16x8, 8x8, auto"]),
    ],
)
def test_a_size_that_cannot_be_made_is_refused_with_those_that_can(
    sizes: Sizes, wished: tuple[int, int], text: list[str]
) -> None:
    with pytest.raises(RequestError) as caught:
        sizes.check(*wished)
    assert caught.value.param == "size"
    assert all(each in str(caught.value) for each in text), str(caught.value)


@pytest.mark.parametrize("size", [(8, 8), (2, 128), (16, 16), (32, 8)])
def test_every_multiple_up_to_the_limit_is_made(size: tuple[int, int]) -> None:
    SIZES.check(*size)


def test_another_width_of_the_call_gives_other_last_bits_or_the_same_but_nearly_the_same_picture(
    denoiser: Denoiser, encoder: Any
) -> None:
    """Why each size has one width."""
    found = [made(denoiser, encoder, request(8, 8), batch=BatchConfig(padded_rows=rows))[0] for rows in (1, 2, 3, 8)]
    assert max(np.abs(found[0].astype(int) - other.astype(int)).max() for other in found) <= 1
    x, t = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((8,), 0.5)
    told = encoder.encode(["a"] * 8)
    with torch.inference_mode():
        wide = denoiser(x, t, told)
        assert torch.allclose(denoiser(x[:1], t[:1], told.rows(slice(0, 1)))[0], wide[0], atol=1e-4)
        again = denoiser(x.flip(0), t, told)
    assert torch.equal(again.flip(0), wide), "at one width, whatever the place"
