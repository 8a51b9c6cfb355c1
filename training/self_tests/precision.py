"""The machine's arithmetic: products in the precision that the engine chooses, and sums over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from training.noise import normal
from training.parallel import common_precision
from training.self_tests.finding import Finding, failed, measured
from training.self_tests.ground import Ground

SIDE = 512
BOUNDS = {"fp32": 2e-3, "bf16": 2e-2, "fp16": 4e-3}
"""Relative error of a product of 512 terms: fp32 covers TF32's 11 bits, bf16 has 8, fp16 11."""
MEND = "this machine's products are wrong: engine.precision=fp32, and replace the device that this rank ran on"


def check(ground: Ground) -> Finding:
    """A matrix product against float64 on every rank, and an exact sum over the ranks."""
    kind = common_precision("auto")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    a, b = (normal(0, "precision", side, shape=(SIDE, SIDE)) for side in "ab")
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    with torch.autocast(device.type, dtype=types.get(kind), enabled=kind in types):
        product = a.to(device) @ b.to(device)
    exact = a.double() @ b.double()
    error = (product.double().cpu() - exact).norm() / exact.norm()
    errors = torch.zeros(ground.world, dtype=torch.float64, device=device)
    errors[ground.rank] = error.to(device)
    dist.all_reduce(errors)
    # exact in fp32 whatever the order, so that a wrong sum is no matter of rounding
    summed = torch.full((1 << 16,), float(ground.rank + 1), device=device)
    dist.all_reduce(summed)
    expected = ground.world * (ground.world + 1) / 2
    if bool((summed != expected).any()):
        detail = f"a sum over {ground.world} ranks is {float(summed[0])} and should be {expected}"
        return failed("precision", detail, "the network between the nodes garbles data: look at NCCL's or gloo's log")
    worst = int(torch.where(errors.isnan(), torch.inf, errors).argmax())
    detail = f"{kind} products within {float(errors[worst]):.1e} (rank {worst}); sums over {ground.world} ranks exact"
    return measured("precision", float(errors[worst]), BOUNDS[kind], detail, MEND)
