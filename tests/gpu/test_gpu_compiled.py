"""What torch.compile makes of networks on a GPU: on a CPU it was once seen to leave gradients out."""

from typing import Literal

import pytest
import torch
from diffusers import UNet2DConditionModel

from training.engine_config import EngineConfig
from training.noise import normal
from training.parallel_options import prepare

pytestmark = pytest.mark.gpu


def gradients(config: EngineConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    network = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 8), layers_per_block=1,
        cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4, **blocks,
    ).to("cuda")  # fmt: skip
    prepare(network, config, "fp32")
    x, told = normal(0, "x", shape=(2, 3, 8, 8)), normal(0, "told", shape=(2, 4, 8))
    network(x.to("cuda"), torch.tensor([1, 500], device="cuda"), told.to("cuda")).sample.square().mean().backward()
    return {name: weight.grad.cpu() for name, weight in network.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("what", ["blocks", "whole"])
def test_compiled_networks_keep_their_weights_names_and_nearly_their_gradients(
    what: Literal["blocks", "whole"],
) -> None:
    plain, compiled = gradients(EngineConfig()), gradients(EngineConfig(compile=what))
    assert compiled.keys() == plain.keys()
    for name, gradient in plain.items():
        assert torch.allclose(compiled[name], gradient, rtol=1e-2, atol=1e-4), name
