"""Width transfer: nothing grows with the width, without it something does, and the small network's rate is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from training import models
from training.errors import ConfigError
from training.models import DiTConfig, UNetConfig, mup
from training.noise import normal

ROWS, SIDE, CLASSES = 8, 8, 10


def unet(width: int, **options: Any) -> torch.nn.Module:
    """Two levels, of ``width`` and twice as many channels."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    arguments: dict[str, Any] = {
        "sample_size": SIDE,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (width, 2 * width),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": (width // 8, width // 4),
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**arguments, **options})


def dit(width: int, head_width: int = 8) -> torch.nn.Module:
    """Two blocks of ``width`` channels."""
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    network: torch.nn.Module = DiTTransformer2DModel(
        num_attention_heads=width // head_width,
        attention_head_dim=head_width,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        patch_size=2,
        sample_size=SIDE,
        num_embeds_ada_norm=CLASSES,
    )
    return network


def call(network: torch.nn.Module, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The network's answer, to captions or classes that stay the same."""
    if type(network).__name__ == "DiTTransformer2DModel":
        labels = torch.arange(len(x)) % CLASSES
        answer: torch.Tensor = network(x, timestep=(t * 999).long(), class_labels=labels).sample
        return answer
    tokens = normal(0, "tokens", shape=(len(x), 4, 16))
    told: Any = SimpleNamespace(tokens=tokens, mask=torch.ones(len(x), 4, dtype=torch.bool), pooled=None)
    return models.apply(network, x, t, told)


def fresh(make: Callable[[int], torch.nn.Module], width: int, base: int | None) -> tuple[Any, Mapping[str, mup.Scale]]:
    """A network, and its factors: those of width transfer from ``base``, or all 1."""
    torch.manual_seed(0)
    network, small = make(width), make(width if base is None else base)
    factors = mup.scales(network, small)
    mup.restart(network, factors)
    return network.eval(), factors  # without DiT's own dropout of labels


def adam(network: torch.nn.Module, factors: Mapping[str, mup.Scale], rate: float) -> torch.optim.Optimizer:
    """Adam with each weight's own rate."""
    groups = [{"params": [weight], "lr": rate * factors[name].rate} for name, weight in network.named_parameters()]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def sizes(make: Callable[[int], torch.nn.Module], width: int, base: int | None, rate: float, steps: int) -> Any:
    """The mean size of every layer's output after ``steps`` steps on one batch."""
    network, factors = fresh(make, width, base)
    optimizer = adam(network, factors, rate)
    seen: dict[str, float] = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.register_forward_hook(
                lambda _m, _i, output, name=name: seen.update({name: float(output.detach().abs().mean())})
            )
    x, y = (normal(0, name, shape=(ROWS, 3, SIDE, SIDE)) for name in "xy")
    t = torch.linspace(0.1, 0.9, ROWS)
    for _ in range(steps):
        optimizer.zero_grad()
        (call(network, x, t) - y).square().mean().backward()
        optimizer.step()
    call(network, x, t)
    return dict(seen)


WIDTHS = {unet: (16, 128, 1e-3), dit: (32, 256, 1e-2)}
"""From and to how many channels (the UNet's second level has twice as many), and the rate."""


def growth(make: Callable[[int], torch.nn.Module], transfer: bool, steps: int = 3) -> dict[str, float]:
    """By which power of the width every layer's output has grown: 0 stays as it is, 1 grows as the width does."""
    narrow, wide, rate = WIDTHS[make]
    before = sizes(make, narrow, narrow if transfer else None, rate, steps)
    after = sizes(make, wide, narrow if transfer else None, rate, steps)
    return {name: math.log(after[name] / size) / math.log(wide / narrow) for name, size in before.items()}


@pytest.mark.parametrize("make", WIDTHS, ids=lambda make: make.__name__)
def test_no_layer_grows_with_the_width_and_without_transfer_one_does(make: Callable[[int], torch.nn.Module]) -> None:
    """The coordinate check (Yang et al. 2022, appendix D.1)."""
    with_transfer, without = growth(make, True), growth(make, False)
    assert len(with_transfer) > 10
    assert {name: power for name, power in with_transfer.items() if power > 0.3} == {}
    assert max(without.values()) > 0.6


def test_at_the_bases_width_nothing_is_changed() -> None:
    network, factors = fresh(unet, 16, 16)
    torch.manual_seed(0)
    plain = unet(16)
    assert set(factors.values()) == {mup.Scale(1.0, 1.0)}
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), plain.parameters(), strict=True))


def test_every_kind_of_weight_gets_its_own_factors() -> None:
    _, factors = fresh(dit, 64, 16)
    block = "transformer_blocks.0"
    assert factors["pos_embed.proj.weight"].rate == 1, "the picture's channels do not grow"
    assert factors[f"{block}.attn1.to_q.weight"].rate == 0.25, "hidden"
    assert factors[f"{block}.attn1.to_q.bias"].rate == 1
    assert factors["proj_out_2.weight"].rate == 0.25, "the output"
    table = f"{block}.norm1.emb.class_embedder.embedding_table.weight"
    assert factors[table].rate == 1, "a row is looked up, not summed over"
    _, factors = fresh(unet, 64, 16)
    cross = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    assert factors[f"{cross}.to_k.weight"].rate == 1, "the caption's width does not grow"
    assert factors[f"{cross}.to_out.0.weight"].rate == 0.25
    assert factors["conv_out.weight"].rate == 0.25
    assert factors["down_blocks.0.resnets.0.norm1.weight"] == mup.Scale(1.0, 1.0), "gains start at 1"


def test_fresh_weights_have_the_sizes_of_the_table() -> None:
    narrow, _ = fresh(dit, 32, 32)
    wide, _ = fresh(dit, 128, 32)
    small, large = (dict(network.named_parameters()) for network in (narrow, wide))

    def ratio(name: str) -> float:
        return float(large[name].detach().std() / small[name].detach().std())

    assert ratio("proj_out_2.weight") == pytest.approx(1 / 4, rel=0.15)
    assert ratio("transformer_blocks.0.attn1.to_q.weight") == pytest.approx(1 / 2, rel=0.15)
    assert ratio("transformer_blocks.0.norm1.linear.bias") == pytest.approx(1, rel=0.15)


def test_wider_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"width of an attention head .*\n  value:   4\n  rule:    8, as in"):
        mup.scales(dit(32), dit(16, head_width=4))


def test_another_network_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.mup_base is another network"):
        mup.scales(unet(16), unet(16, layers_per_block=2))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"widths": (32, 64), "attention": (False, True), "mup_base": {"heads": 2}}, "what grows is widths"),
        ({"widths": (32, 64), "attention": (False, True), "mup_base": {"widths": (32,)}}, "1 levels, attention 2"),
        ({"widths": (32, 64), "attention": (False, True), "mup_base": {"widths": (8, 12)}}, "multiple of norm_groups"),
    ],
)
def test_a_base_that_is_no_narrower_network_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        UNetConfig(**config)


def test_the_base_differs_in_width_alone() -> None:
    config = DiTConfig(heads=12, layers=4, mup_base={"heads": 2})
    assert config.base() == DiTConfig(heads=2, layers=4)
    assert DiTConfig(heads=12).base() is None
    assert DiTConfig.model_validate(config.model_dump(mode="json")) == config


def test_an_optimizer_of_another_kind_is_refused() -> None:
    config = DiTConfig(heads=12, mup_base={"heads": 2})
    mup.check_optimizer(config, "adamw")
    mup.check_optimizer(DiTConfig(), "muon")
    with pytest.raises(ValueError, match="transfers the rate of adamw or schedule_free, not of muon"):
        mup.check_optimizer(config, "muon")


def final_loss(width: int, base: int | None, rate: float, steps: int = 120) -> float:
    """Rectified flow's loss on fixed pictures, over the last steps."""
    network, factors = fresh(dit, width, base)
    optimizer = adam(network, factors, rate)
    rows = torch.arange(SIDE, dtype=torch.float32)
    waves = [torch.sin((k + 1) * rows[:, None] / 3 + k * rows[None, :] / 2) for k in range(CLASSES)]
    clean = torch.stack(waves)[torch.arange(ROWS) % CLASSES][:, None].expand(-1, 3, -1, -1)
    losses = []
    for step in range(steps):
        noise = normal(1, step, "noise", shape=(ROWS, 3, SIDE, SIDE))
        t = torch.sigmoid(normal(1, step, "t", shape=(ROWS,)))
        x = (1 - t[:, None, None, None]) * clean + t[:, None, None, None] * noise
        loss = (call(network, x, t) - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] *= 1 if step < steps // 2 else 0.95
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-20:]) / 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_small_networks_best_rate_is_the_wide_ones_too() -> None:
    rates = [2.0**-power for power in range(4, 11)]

    def best(width: int, base: int | None) -> int:
        found = [final_loss(width, base, rate) for rate in rates]
        finite = [loss if math.isfinite(loss) else math.inf for loss in found]
        return finite.index(min(finite))

    small = best(32, 32)
    assert abs(best(256, 32) - small) <= 1, "within a factor of two"
    assert best(256, None) - small >= 2, "without transfer, the wide one wants a lower rate"
