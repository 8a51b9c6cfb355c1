"""The peer of the start-up benchmark: the same first step the way Ray's documentation shows it."""

from __future__ import annotations

import sys
import time
from pathlib import Path


def loop(config: dict[str, str]) -> None:
    """One optimizer step of the same network on noise."""
    import deepspeed
    import ray.train
    import torch

    from training.conditioning import Conditioning, ConditioningShape
    from training.models.unet import UNetConfig
    from training.objectives import RectifiedFlow
    from training.precision import has_bf16
    from training.step import ObjectiveLoss

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a compilation of 41 s, once per machine
    network = UNetConfig().build(ConditioningShape("text", 24, 384), 3, 1)
    objective = RectifiedFlow()
    engine, *_ = deepspeed.initialize(
        model=ObjectiveLoss(network, objective),
        optimizer=torch.optim.AdamW(network.parameters(), 1e-3),
        config={
            "train_micro_batch_size_per_gpu": 32,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "torch_autocast": {"enabled": has_bf16(), "dtype": "bfloat16", "lower_precision_safe_modules": []},
        },
        dist_init_required=False,
    )
    told = Conditioning(torch.zeros(32, 24, 384), torch.ones(32, 24, dtype=torch.bool))
    draws = objective.draw(0, [0] * 32, list(range(32)), (3, 32, 32))
    loss = engine(torch.randn(32, 3, 32, 32), told, draws, torch.ones(32))
    engine.backward(loss)
    engine.step()
    if ray.train.get_context().get_world_rank() == 0:
        Path(config["told"]).write_text(str(time.time()))
    ray.train.report({})


if __name__ == "__main__":
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    ray.init(log_to_driver=False)
    scaling = ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.9})
    told = Path(sys.argv[1]) / "first_step_s"
    told.parent.mkdir(parents=True, exist_ok=True)
    TorchTrainer(
        loop,
        train_loop_config={"told": str(told)},
        scaling_config=scaling,
        run_config=ray.train.RunConfig(storage_path=sys.argv[1]),
    ).fit()
    print("FIRST", told.read_text())
