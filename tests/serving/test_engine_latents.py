"""The engine with a network that draws latents and is told classes: decoded at the end, encoded for an edit."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image

from serving.config import BatchConfig
from serving.engine import Engine
from serving.errors import RequestError
from serving.job import to_picture
from serving.schemas import GenerationRequest, ImageReady, Preview, StartImage
from training import noise
from training.canvas import Canvas
from training.conditioning import ClassEncoder
from training.models import UNetConfig, apply
from training.objectives import RectifiedFlow
from training.samplers import Guided, sample

SIDE = 16
ENCODER = ClassEncoder(["cat", "dog"])
OBJECTIVE = RectifiedFlow(time_shift=2.0)
BATCH = BatchConfig(padded_rows=4, max_batch_rows=8, max_waiting_images=16)


@pytest.fixture(scope="module")
def canvas(tmp_path_factory: pytest.TempPathFactory) -> Canvas:
    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.7,
    )
    folder = tmp_path_factory.mktemp("autoencoder") / "vae"
    model.save_pretrained(folder, safe_serialization=True)
    return Canvas(SIDE, folder)


@pytest.fixture(scope="module")
def network(canvas: Canvas) -> Any:
    torch.manual_seed(1)
    config = UNetConfig(resolution=SIDE, widths=(8, 16), attention=(False, True), head_width=8, norm_groups=4)
    unet = config.build(ENCODER.shape, canvas.channels, canvas.factor).eval().requires_grad_(False)
    return partial(apply, unet)


def made(network: Any, canvas: Canvas, **fields: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """The picture of a request, and its previews."""
    asked = {"prompt": "dog", "seed": 5, "steps": 4, "width": SIDE, "height": SIDE, "guidance_scale": 2.5, **fields}
    previews: list[np.ndarray] = []

    async def main() -> np.ndarray:
        denoiser = OBJECTIVE.denoiser(network)
        async with (
            Engine(denoiser, ENCODER, canvas=canvas, config=BATCH, grid=OBJECTIVE.grid) as engine,
            aclosing(engine.submit(GenerationRequest(**asked))) as events,
        ):
            async for event in events:
                if isinstance(event, Preview):
                    previews.append(np.asarray(event.image))
                if isinstance(event, ImageReady):
                    return np.asarray(event.image)
        raise AssertionError

    return asyncio.run(asyncio.wait_for(main(), 60)), previews


def test_it_decodes_what_the_sampler_draws_and_its_previews(network: Any, canvas: Canvas) -> None:
    picture, previews = made(network, canvas, previews=2)
    start = noise.normal(5, "serve", shape=(4, SIDE // 2, SIDE // 2))[None]
    guided = Guided(OBJECTIVE.denoiser(network), ENCODER.encode([""]), torch.tensor([2.5]))
    expected = canvas.pictures(sample(guided, start, ENCODER.encode(["dog"]), OBJECTIVE.grid(4)))
    assert np.abs(np.asarray(to_picture(expected[0])).astype(int) - picture.astype(int)).max() <= 1
    assert picture.std() > 5
    assert [preview.shape for preview in previews] == [(SIDE, SIDE, 3)] * 2
    other, _ = made(network, canvas, prompt="cat")
    assert not np.array_equal(picture, other)


def test_an_edit_keeps_pixels_that_the_autoencoder_would_change(network: Any, canvas: Canvas) -> None:
    given = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (0, 0, 7, SIDE))
    edited, _ = made(network, canvas, start=StartImage(given, 0.75, mask))
    assert np.array_equal(edited[:, 7:], np.asarray(given)[:, 7:]), "kept bit for bit, beside an odd border too"
    assert not np.array_equal(edited[:, :7], np.asarray(given)[:, :7])
    free, _ = made(network, canvas, start=StartImage(given, 0.75))
    again, _ = made(network, canvas, start=StartImage(given, 0.75))
    assert np.array_equal(free, again)
    assert not np.array_equal(free[:, 7:], np.asarray(given)[:, 7:])
    little, _ = made(network, canvas, start=StartImage(given, 0.01, None), steps=100, guidance_scale=1.0)
    loaded = torch.from_numpy(np.array(given)).permute(2, 0, 1).float() / 127.5 - 1
    decoded = np.asarray(to_picture(canvas.pictures(canvas.clean(loaded[None]))[0])).astype(int)
    assert np.abs(little.astype(int) - decoded).mean() < np.abs(free.astype(int) - decoded).mean()


def test_a_class_that_is_not_known_is_refused_with_those_that_are(network: Any, canvas: Canvas) -> None:
    with pytest.raises(RequestError) as caught:
        made(network, canvas, prompt="horse")
    assert caught.value.param == "prompt"
    text = str(caught.value)
    assert "This model knows no such class." in text
    assert "options: cat, dog" in text
