"""What the recipe's engine section does to the network before the engine takes it."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from training.engine_config import EngineConfig
from training.errors import ConfigError
from training.noise import normal
from training.parallel_options import prepare


def network() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )


class Loss(torch.nn.Module):
    """A network under a loss, as a run has it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network().train()

    def forward(self) -> torch.Tensor:
        """Of two fixed rows."""
        x, told = normal(0, "x", shape=(2, 3, 8, 8)), normal(0, "told", shape=(2, 4, 8))
        found: torch.Tensor = self.network(x, torch.tensor([1, 500]), told).sample
        return found.square().mean()


def gradients(config: EngineConfig) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients of a prepared module."""
    module = Loss()
    prepare(module, config, "fp32")
    loss = module()
    loss.backward()
    found = {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}
    return float(loss.detach()), found


def test_activations_that_are_computed_again_give_the_same_gradients() -> None:
    loss, plain = gradients(EngineConfig())
    again, recomputed = gradients(EngineConfig(gradient_checkpointing=True))
    assert again == loss
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in plain.items())
    module = Loss()
    prepare(module, EngineConfig(gradient_checkpointing=True), "fp32")
    assert module.network.is_gradient_checkpointing


@pytest.mark.slow
def test_compiled_blocks_keep_their_weights_names_and_nearly_their_gradients() -> None:
    loss, plain = gradients(EngineConfig())
    compiled_loss, compiled = gradients(EngineConfig(compile="blocks"))
    assert compiled_loss == pytest.approx(loss, rel=1e-4)
    assert compiled.keys() == plain.keys()
    for name, gradient in plain.items():
        assert torch.allclose(compiled[name], gradient, rtol=1e-2, atol=1e-4), name


def test_a_whole_network_is_not_compiled_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"leaves gradients of convolutions at 0(.|\n)*compile: blocks"):
        prepare(Loss(), EngineConfig(compile="whole"), "fp32")


def test_a_network_that_cannot_compute_again_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot compute its activations again"):
        prepare(torch.nn.Linear(2, 2), EngineConfig(gradient_checkpointing=True), "fp32")


def test_compiling_without_a_compiler_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler(.|\n)*install g\+\+"):
        prepare(Loss(), EngineConfig(compile="blocks"), "fp32")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_products_are_in_the_asked_precision_and_weights_in_fp32(precision: Any, dtype: torch.dtype | None) -> None:
    """Also inside a region where somebody has turned autocast off, as DeepSpeed does on a GPU."""
    module = Loss()
    prepare(module, EngineConfig(), precision)
    seen = set()
    first = module.network.time_embedding.linear_1
    first.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    with torch.autocast("cpu", enabled=False):
        module().backward()
    assert seen == {dtype or torch.float32}
    assert {weight.dtype for weight in module.parameters()} == {torch.float32}
    assert first.weight.grad is not None
    assert first.weight.grad.dtype == torch.float32


def test_fp8_names_its_package_and_its_hardware() -> None:
    with pytest.raises(ConfigError, match=r"torchao(.|\n)*Hopper"):
        prepare(Loss(), EngineConfig(precision="fp8"), "fp8")
