"""The kernel distance and evaluation samples, on a data set made of simple shapes."""

from functools import partial

import numpy as np
import pytest
import torch

from training import noise
from training.canvas import Canvas
from training.conditioning import Conditioning, ConditioningShape
from training.errors import UsageError
from training.evaluate.features import EfficientNetFeatures
from training.evaluate.kid import kid
from training.evaluate.samples import sample_captions
from training.models import UNetConfig, apply
from training.objectives import FlowDenoiser, Network
from training.samplers import times


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> EfficientNetFeatures:
    return EfficientNetFeatures(tmp_path_factory.mktemp("features"))


def _discs(seed: int, count: int) -> torch.Tensor:
    """Discs of random colour, size and place."""
    draw = noise.generator(seed, "discs")
    x, y = np.meshgrid(np.arange(32), np.arange(32))
    pictures = []
    for _ in range(count):
        (cx, cy), radius = draw.uniform(8, 24, 2), draw.uniform(4, 10)
        inside = (x - cx) ** 2 + (y - cy) ** 2 < radius**2
        pictures.append(np.where(inside[None], draw.integers(0, 256, (3, 1, 1)), 255).astype(np.uint8))
    return torch.from_numpy(np.stack(pictures))


def test_near_zero_for_the_same_distribution_and_large_for_noise(extractor: EfficientNetFeatures) -> None:
    real = _discs(1, 60)
    noisy = torch.from_numpy(noise.generator(3, "noise").integers(0, 256, real.shape, dtype=np.uint8))
    options = {"subset_size": 40, "subsets": 20, "seed": 7, "extractor": extractor}
    same = kid(_discs(2, 60), real, **options)
    far = kid(noisy, real, **options)
    assert abs(same.mean) < 0.05
    assert far.mean > 10 * max(abs(same.mean), 0.02)
    assert same.features == "efficientnet-lite0"
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    assert kid(noisy, real, **options) == far, "the same seed gives the same subsets"
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's generator is left alone"
    assert kid(noisy, real, **(options | {"seed": 8})).mean != far.mean


def test_too_few_pictures(extractor: EfficientNetFeatures) -> None:
    with pytest.raises(UsageError, match=r"2 <= subset_size <= 3 \(the smaller of 3 generated, 5 real\)"):
        kid(_discs(1, 3), _discs(1, 5), subset_size=4, subsets=1, seed=0, extractor=extractor)


def _network() -> Network:
    torch.manual_seed(0)
    unet = (
        UNetConfig(resolution=16, widths=(16, 32), attention=(False, True), head_width=16)
        .build(ConditioningShape("text", 4, 8))
        .eval()
    )
    return partial(apply, unet)


def _conditioning(count: int) -> Conditioning:
    return Conditioning(noise.normal(0, "tokens", shape=(count, 4, 8)), torch.ones(count, 4, dtype=torch.bool))


def test_samples_depend_on_seed_number_and_caption() -> None:
    denoiser = FlowDenoiser(_network())
    options = {"seed": 3, "canvas": Canvas(16), "grid": times(2), "guidance_scale": 2.0}
    conditioning, null = _conditioning(5), _conditioning(1)
    pictures = sample_captions(denoiser, conditioning, null, rows=range(5), batch=5, **options)
    assert (pictures.dtype, pictures.shape) == (torch.uint8, (5, 3, 16, 16))
    last = sample_captions(denoiser, conditioning.rows(slice(3, 5)), null, rows=[3, 4], **options)
    assert (last.int() - pictures[3:].int()).abs().max() <= 1
    unguided = sample_captions(denoiser, conditioning, null, rows=range(5), **(options | {"guidance_scale": 1.0}))
    assert not torch.equal(unguided, pictures)
