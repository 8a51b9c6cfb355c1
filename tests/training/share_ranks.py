"""The program of ``test_step.py``: ranks that take steps on their shares of global batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from tests.training.forked import together
from training.conditioning import Conditioning
from training.data.batch import Batch
from training.ema import Ema, EmaConfig
from training.engine_config import EngineConfig
from training.noise import normal
from training.objectives import RectifiedFlow
from training.optim import AdamWConfig, ConstantSchedule
from training.parallel import Engine, connect
from training.step import DiffusionStep, ObjectiveLoss
from training.stopwatch import Stopwatch

GLOBAL_BATCH, STEPS = 7, 3
CASES = ((1, 0, None), (2, 2, None), (3, 1, 2), (4, 3, 1))
"""World, ZeRO stage and micro-batch."""
MISSING = {3, 9}
"""Samples that cannot be read."""


class Convolutions(ObjectiveLoss):
    """A network that looks at nothing but the pictures."""

    def predict(self, x: torch.Tensor, t: torch.Tensor, conditioning: Any) -> torch.Tensor:  # noqa: ARG002  as its base
        found: torch.Tensor = self.network(x)
        return found


class Captions:
    """States of captions that say nothing."""

    def rows(self, ids: list[int]) -> Conditioning:
        """A row per id."""
        return Conditioning(torch.zeros(len(ids), 1, 1), torch.ones(len(ids), 1, dtype=torch.bool))


def batch(step: int, rank: int, world: int) -> Batch:
    """This rank's share of a step's global batch: uneven where the world does not divide it."""
    rows = range(rank * GLOBAL_BATCH // world, (rank + 1) * GLOBAL_BATCH // world)
    ids = tuple(step * GLOBAL_BATCH + row for row in rows)
    pictures = torch.stack([normal(0, "picture", sample, shape=(3, 8, 8)) for sample in ids])
    images = ((pictures.clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
    return Batch(
        images=images,
        captions=("",) * len(ids),
        sample_ids=ids,
        epochs=(0,) * len(ids),
        position=step * GLOBAL_BATCH,
        valid=tuple(sample not in MISSING for sample in ids),
        bucket=0,
        sizes=torch.zeros(len(ids), 6, dtype=torch.int32),
    )


def rank(number: int, world: int, port: int, stage: int, micro_batch: int | None, out: Path) -> None:
    """One training process."""
    torch.set_num_threads(1)
    connect(number, number, world, "127.0.0.1", port)
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(8, 3, 3, padding=1)]
    objective = RectifiedFlow()
    config = EngineConfig(zero_stage=stage, precision="fp32", micro_batch=micro_batch)  # type: ignore[arg-type]
    module = Convolutions(torch.nn.Sequential(*layers), objective)
    engine = Engine(module, AdamWConfig(), config, GLOBAL_BATCH)
    step = DiffusionStep(
        engine,
        objective,
        Captions(),  # type: ignore[arg-type]
        Captions().rows([0]),
        Ema(EmaConfig(), engine.weights, engine.device, engine.average_into),
        ConstantSchedule(warmup_steps=0),
        STEPS,
        0,
        GLOBAL_BATCH,
    )
    clock = Stopwatch()
    told = [dict(step(index, batch(index, number, world), clock)) for index in range(STEPS)]
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, told)
    weights = engine.whole("weights")
    if number == 0:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, out / f"{world}.safetensors")
        (out / f"{world}.json").write_text(json.dumps({"everyone": everyone, "sections": sorted(clock.totals())}))
    dist.destroy_process_group()


def main(words: list[str]) -> int:
    """Every case; 1 where a rank failed."""
    return int(any(any(together(world, rank, stage, rows, Path(words[0]))) for world, stage, rows in CASES))
