"""ZeRO: wrong gradients of one stage have gone unnoticed for months, because the loss still fell."""

from __future__ import annotations

import torch

from training.self_tests.finding import Finding, measured
from training.self_tests.ground import CLIP, OPTIMIZER, Ground, Probe, largest_difference

STEPS = 4
STAGES = (0, 1, 2, 3)
TOLERANCE = 2e-4
"""Of the largest weight of a tensor: sums in another order differ in the last bits, which Adam's first steps, of one
size whatever the gradient's, make larger. A gradient that is wrong by a tenth changes 1e-2."""
MEND = (
    "do not train with this stage here: engine.zero_stage of another that is right, and look at DeepSpeed's and NCCL's"
    " or gloo's versions (DeepSpeed 0.17.6 to 0.18.2 had wrong ZeRO 2 gradients)"
)


def check(ground: Ground) -> Finding:
    """Weights after a few steps, whole and accumulated micro-batches, against PyTorch's own data parallelism."""
    expected = reference(ground)
    gaps = {}
    for stage in STAGES:
        for micro_batch in (None, 2):
            engine = ground.engine(stage, micro_batch)
            ground.train(engine, 0, STEPS)
            name = f"ZeRO {stage}, micro-batches of {engine.micro_batch}"
            gaps[name] = largest_difference(engine.whole("weights"), expected)
    worst = max(gaps, key=lambda name: (gaps[name][0] != gaps[name][0], gaps[name][0]))
    gap, where = gaps[worst]
    wrong = [name for name, (found, _) in gaps.items() if not found <= TOLERANCE]
    detail = f"{len(gaps)} combinations within {gap:.1e} of DistributedDataParallel; {worst}: {where}"
    if wrong:
        detail = f"differs from DistributedDataParallel by {gap:.1e}: {'; '.join(wrong)}"
    return measured("zero_stages", gap, TOLERANCE, detail, MEND)


def reference(ground: Ground) -> dict[str, torch.Tensor]:
    """What torch alone makes of the same batches."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    module = Probe().to(device)
    parallel = torch.nn.parallel.DistributedDataParallel(module)
    optimizer = torch.optim.AdamW(
        module.parameters(),
        lr=OPTIMIZER.learning_rate,
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        eps=OPTIMIZER.epsilon,
        weight_decay=OPTIMIZER.weight_decay,
    )
    for step in range(STEPS):
        optimizer.zero_grad()
        parallel(ground.batch(step).to(device)).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
    return {name: weight.detach() for name, weight in module.named_parameters()}
