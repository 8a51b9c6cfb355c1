"""Master weights: in bf16, updates smaller than 1/256 of a weight vanish, and training slows down unnoticed."""

from __future__ import annotations

import torch

from training.self_tests.finding import Finding, failed, reached
from training.self_tests.ground import Ground

MEND = "engine.precision must leave weights and optimizer in fp32: look at what the engine hands to DeepSpeed"


def check(ground: Ground) -> Finding:
    """Under this machine's own precision the kept weights are fp32, and hold values that bf16 cannot."""
    shares = []
    for stage in (0, 1, 3):
        engine = ground.engine(stage, precision="auto")
        ground.train(engine, 0, 2)
        for part in engine.parts():
            if part.values.dtype != torch.float32:
                detail = f"{part.group} of {part.name} under ZeRO {stage} is {part.values.dtype}"
                return failed("master_weights", detail, MEND)
        weights = torch.cat([weight.flatten() for weight in engine.whole("weights").values()])
        shares.append(float((weights != weights.bfloat16().float()).float().mean()))
    detail = f"fp32 at every stage; {min(shares):.0%} of the values need more than bf16's 8 bits"
    return reached("master_weights", min(shares), 0.9, detail, MEND)
