"""On a GPU: pictures that do not depend on their neighbours, and the switches that only a GPU has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from serving.batching import Row, denoise
from serving.fast_network import fast_network
from serving.speed import SpeedConfig
from training import noise
from training.conditioning import Conditioning, ConditioningShape
from training.models import SD3Config, UNetConfig
from training.objectives import Denoiser, RectifiedFlow
from training.samplers import Trajectory, times

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

TOKENS, WIDTH, SIDE, ROWS = 12, 64, 32, 8
FAMILIES = {
    "unet": UNetConfig(resolution=SIDE, widths=(64, 128), attention=(False, True), head_width=32),
    "sd3": SD3Config(resolution=SIDE, layers=4, heads=4, head_width=32),
}


def denoiser(family: str, speed: SpeedConfig) -> Denoiser:
    torch.manual_seed(0)
    module = FAMILIES[family].build(ConditioningShape("text", TOKENS, WIDTH)).cuda().eval().requires_grad_(False)
    for parameter in module.parameters():  # fresh transformers predict zero
        torch.nn.init.normal_(parameter, std=0.05)
    return RectifiedFlow().denoiser(fast_network(module, speed, device="cuda", variant=lambda: None))


def row(seed: int, steps: int) -> Row:
    told, negative = (
        Conditioning(
            noise.normal(seed, name, shape=(1, TOKENS, WIDTH)).cuda(), torch.ones(1, TOKENS, dtype=torch.bool).cuda()
        )
        for name in ("prompt", "negative")
    )
    x = noise.normal(seed, "serve", shape=(3, SIDE, SIDE)).cuda()
    return Row(Trajectory(x, times(steps).cuda(), "euler", seed), told, negative, 3.0)


def picture(model: Denoiser, neighbours: Callable[[], list[Row]] = list) -> torch.Tensor:
    chosen = row(7, 6)
    while not chosen.trajectory.finished:
        others = neighbours()
        denoise(model, [*others, chosen], ROWS)
    return chosen.trajectory.x


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "speed",
    [SpeedConfig(), SpeedConfig(bf16=True), SpeedConfig(cuda_graphs=True), SpeedConfig(compiled=True)],
    ids=["plain", "bf16", "cuda_graphs", "compiled"],
)
def test_a_row_is_bit_identical_whoever_shares_its_batch(family: str, speed: SpeedConfig) -> None:
    model = denoiser(family, speed)
    alone = picture(model)
    assert torch.isfinite(alone).all()
    draw = noise.generator(0, "neighbours")
    for _ in range(20):
        found = picture(model, lambda: [row(int(draw.integers(100)), 5) for _ in range(int(draw.integers(4)))])
        assert torch.equal(found, alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_graphs_change_no_bit(family: str) -> None:
    plain = picture(denoiser(family, SpeedConfig()))
    assert torch.equal(picture(denoiser(family, SpeedConfig(cuda_graphs=True))), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_compiling_and_bf16_change_little(family: str) -> None:
    plain = picture(denoiser(family, SpeedConfig()))
    compiled = picture(denoiser(family, SpeedConfig(compiled=True)))
    half = picture(denoiser(family, SpeedConfig(bf16=True)))
    assert (compiled - plain).abs().max() < 0.02 * plain.abs().max()
    assert 0 < (half - plain).abs().max() < 0.1 * plain.abs().max()
