"""The families: built for what they are told and shown, exact while training, and refused where they cannot fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from training import noise
from training.conditioning import Conditioning, ConditioningShape
from training.config import parse
from training.errors import ConfigError
from training.models import DiTConfig, PixArtConfig, SD3Config, UNetConfig, apply, network_class

TEXT = ConditioningShape("text", tokens=5, width=12)
POOLED = ConditioningShape("text", tokens=5, width=12, pooled=7)
CLASSES, NOTHING = ConditioningShape("class", classes=3), ConditioningShape("none")
UNET = UNetConfig(resolution=16, widths=(8, 16), attention=(False, True), head_width=8, norm_groups=4)
SMALL: dict[str, Any] = {"resolution": 16, "layers": 2, "heads": 2, "head_width": 8}
FITTING = [
    (UNET, TEXT, "UNet2DConditionModel"),
    (UNET, CLASSES, "UNet2DModel"),
    (UNET, NOTHING, "UNet2DModel"),
    (DiTConfig(**SMALL), CLASSES, "DiTTransformer2DModel"),
    (DiTConfig(**SMALL), NOTHING, "DiTTransformer2DModel"),
    (SD3Config(**SMALL, max_patches=16), TEXT, "SD3Transformer2DModel"),
    (SD3Config(**SMALL, max_patches=16), POOLED, "SD3Transformer2DModel"),
    (PixArtConfig(**SMALL), TEXT, "PixArtTransformer2DModel"),
]


def rows(shape: ConditioningShape, key: str = "told") -> Conditioning:
    """Two rows that say different things."""
    if shape.kind != "text":
        numbers = torch.tensor([0.0, float(shape.classes)]).reshape(2, 1, 1)
        return Conditioning(numbers, torch.ones(2, 1, dtype=torch.bool))
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    tokens = noise.normal(0, key, shape=(2, shape.tokens, shape.width)) * mask[..., None]
    return Conditioning(tokens, mask, noise.normal(0, key, "pooled", shape=(2, shape.pooled)) if shape.pooled else None)


def alive(network: torch.nn.Module) -> torch.nn.Module:
    """No weight is zero, so that every part of the network says something."""
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.copy_(noise.normal(0, number, shape=tuple(parameter.shape)) * 0.15)
    return network


@pytest.mark.parametrize(("config", "shape", "name"), FITTING)
@pytest.mark.parametrize(("channels", "factor"), [(3, 1), (4, 2)])
def test_it_predicts_in_pixels_and_in_latents(config: Any, shape: Any, name: str, channels: int, factor: int) -> None:
    network = alive(config.build(shape, channels, factor))
    assert type(network).__name__ == name
    assert network_class(name) is type(network)
    x = noise.normal(1, shape=(2, channels, 16 // factor, 16 // factor))
    t, told = torch.tensor([0.2, 0.9]), rows(shape)
    predicted = apply(network, x, t, told)
    assert predicted.shape == x.shape
    assert not torch.equal(predicted, apply(network, x, t.flip(0), told)), "it is told the time"
    if shape.kind != "none":
        other = told.rows([1, 0])
        assert not torch.allclose(predicted, apply(network, x, t, other), atol=1e-4), "it is told the condition"


@pytest.mark.parametrize(("config", "shape", "name"), FITTING)
def test_training_draws_nothing_and_checkpointing_changes_nothing(config: Any, shape: Any, name: str) -> None:
    """diffusers' DiT drops a tenth of the labels by the global generator, which no resumed run could repeat."""
    network = alive(config.build(shape)).train()
    x, t = noise.normal(1, shape=(2, 3, 16, 16)), torch.tensor([0.2, 0.9])
    gradients = []
    for checkpointing in (False, False, True):
        if checkpointing:
            network.enable_gradient_checkpointing()
        network.zero_grad()
        state = torch.random.get_rng_state()
        apply(network, x, t, rows(shape)).square().sum().backward()
        assert torch.equal(state, torch.random.get_rng_state()), name
        gradients.append([parameter.grad for parameter in network.parameters()])
    for other in gradients[1:]:
        assert all(torch.equal(one, two) for one, two in zip(gradients[0], other, strict=True))


@pytest.mark.parametrize("config", [DiTConfig(**SMALL), SD3Config(**SMALL, max_patches=16), PixArtConfig(**SMALL)])
def test_a_fresh_transformer_predicts_zero_and_every_weight_learns(config: Any) -> None:
    shape = CLASSES if config.family == "dit" else TEXT
    network = config.build(shape)
    x, t = noise.normal(1, shape=(2, 3, 16, 16)), torch.tensor([0.2, 0.9])
    assert float(apply(network, x, t, rows(shape)).detach().abs().max()) == 0
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(4):  # what is zero lets gradients through one layer further at each step
        optimizer.zero_grad()
        (apply(network, x, t, rows(shape)) - x).square().sum().backward()
        optimizer.step()
    still = [name for name, each in network.named_parameters() if each.grad is None or not each.grad.any()]
    assert still == []


def test_padding_of_a_caption_is_passed_over() -> None:
    for config in (UNET, PixArtConfig(**SMALL)):
        network = alive(config.build(TEXT))
        x, t, told = noise.normal(1, shape=(2, 3, 16, 16)), torch.tensor([0.2, 0.9]), rows(TEXT)
        noisy = Conditioning(torch.where(told.mask[..., None], told.tokens, 9.0), told.mask)
        torch.testing.assert_close(apply(network, x, t, told), apply(network, x, t, noisy))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"family": "dit"}}, "family dit is told a class or nothing, not text"),
        (
            {"model": {"family": "sd3"}, "conditioning": {"kind": "class"}},
            "family sd3 is told captions, not class: conditioning.kind=text, or family dit, unet",
        ),
        (
            {"model": {"family": "pixart"}, "conditioning": {"kind": "none"}},
            "family pixart is told captions, not none",
        ),
        (
            {"model": {"family": "dit", "patch": 5}, "conditioning": {"kind": "class"}},
            "a side of 32 must be a multiple of 5, the patch: 30 or 35",
        ),
        (
            {"model": {"family": "dit", "heads": 3, "head_width": 5}, "conditioning": {"kind": "class"}},
            "heads x head_width is 15 and must be a multiple of 4",
        ),
        (
            {
                "model": {"family": "dit", "resolution": 64},
                "conditioning": {"kind": "class"},
                "data": {"path": "x", "buckets": {"aspect_limit": 2, "step": 16}},
            },
            "family dit makes squares only, not ",
        ),
        (
            {
                "model": {"family": "sd3", "resolution": 64, "max_patches": 36},
                "data": {"path": "x", "buckets": {"aspect_limit": 2, "step": 16}},
            },
            "max_patches is 36: model.max_patches=40",
        ),
        (
            {
                "model": {"family": "dit", "resolution": 64},
                "conditioning": {"kind": "none"},
                "data": {"path": "x", "buckets": {"resolutions": [32]}},
            },
            "family dit is built for one size, not for 32x32, 64x64: data.buckets.resolutions=[]",
        ),
        (
            {"data": {"path": "x", "buckets": {"aspect_limit": 2, "step": 6}}},
            "must be a multiple of 4, for 3 levels",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"data": {"path": "x"}, **sections})
    assert words in str(caught.value)


def test_a_network_of_no_family_is_refused_by_name() -> None:
    with pytest.raises(ConfigError) as caught:
        apply(torch.nn.Linear(1, 1), torch.zeros(1), torch.zeros(1), rows(NOTHING))
    assert "value:   'Linear'" in str(caught.value)
    assert "DiTTransformer2DModel" in str(caught.value)
