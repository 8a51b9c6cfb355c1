"""Muon: under a sharding that it does not know, it has silently become SGD with momentum."""

from __future__ import annotations

import math

import torch

from training import ranks
from training.optim import MuonConfig
from training.self_tests.finding import Finding, failed, measured
from training.self_tests.ground import Ground

STAGES = (1, 2)
STEPS = 2
OPTIMIZER = MuonConfig(learning_rate=1e-2, weight_decay=0.0)
TOLERANCE = 0.4
"""Newton-Schulz leaves singular values between 0.7 and 1.2 (Jordan et al. 2024); the update of SGD or AdamW is off by a
factor of several."""
MEND = "optimizer.kind=adamw: Muon does not work with this ZeRO stage here; look at training.optim.muon_steps"


def check(ground: Ground) -> Finding:
    """A matrix's update, over its rate, has a largest singular value of 1; and every matrix was made orthogonal."""
    gaps: dict[str, float] = {}
    counted = 0
    for stage in STAGES:
        engine = ground.engine(stage, optimizer=OPTIMIZER)
        before = engine.whole("weights")
        ground.train(engine, 0, 1)
        after = engine.whole("weights")
        matrices = [name for name, weight in engine.names.items() if OPTIMIZER.takes(name, weight)]
        for name in matrices:
            rate = OPTIMIZER.learning_rate * 0.2 * math.sqrt(max(before[name].shape))
            update = (before[name] - after[name]).double() / rate
            gaps[f"{name}, ZeRO {stage}"] = abs(float(torch.linalg.matrix_norm(update, 2)) - 1)
        ground.train(engine, 1, STEPS)
        (made,) = ranks.total(int(getattr(engine.state.torch_optimizer, "orthogonalised", 0)))
        if made < STEPS * len(matrices):
            detail = f"{made} matrices made orthogonal in {STEPS} steps under ZeRO {stage}, of {len(matrices)} a step"
            return failed("muon", detail, MEND)
        counted += made
    worst = max(gaps, key=lambda name: gaps[name])
    detail = f"{counted} matrices made orthogonal; the update's largest singular value is within {gaps[worst]:.2f} of 1"
    return measured("muon", gaps[worst], TOLERANCE, f"{detail} ({worst})", MEND)
