"""The program of ``test_engine_options.py``: optimizers and options on engines in processes of one world and of two.

World sizes, ZeRO stages, optimizers and options train a tiny network, in the combinations that stand for the others,
or with the word ``all`` in every one; another engine goes on from the middle; rank 0 leaves what came of it as JSON.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import Tensor

from tests.training.engine_ranks import CLOCK, WholeState, state_of
from tests.training.forked import together
from training.ema import Ema, EmaConfig
from training.engine_config import EngineConfig
from training.errors import DarkroomError
from training.noise import normal
from training.optim import OptimizerConfig
from training.parallel import Engine, connect

STEPS, MIDDLE, WIDTH = 6, 3, 320
RATES = {"adamw": 5e-3, "schedule_free": 2e-2, "muon": 5e-3, "adafactor": 5e-2}


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        world: processes.
        stage: of ZeRO.
        optimizer: its kind.
        engine: what the recipe's engine section says besides.
        scales: whether a weight has a learning rate of its own.
        batch: rows of a step.
    """

    world: int
    stage: int
    optimizer: str = "adamw"
    engine: dict[str, Any] = field(default_factory=dict)
    scales: bool = False
    batch: int = 8

    @property
    def name(self) -> str:
        """Names its result."""
        options = "-".join(f"{key}={value}" for key, value in self.engine.items() if not key.startswith("offload"))
        offload = {"cpu": "-offload", "nvme": "-disk"}.get(self.engine.get("offload", ""), "")
        scales = "-scales" if self.scales else ""
        return f"{self.optimizer}-world-{self.world}-zero-{self.stage}{offload}{scales}-rows-{self.batch}-{options}"


OFFLOAD, FP16 = {"offload": "cpu"}, {"precision": "fp16"}
DISK = {"offload": "nvme", "offload_path": "disk"}
CASES = [
    *[
        Case(world, stage, kind)
        for kind in ("schedule_free", "muon")
        for world, stage in ((1, 0), (2, 0), (2, 1), (2, 3))
    ],
    *[Case(world, 0, "adafactor") for world in (1, 2)],
    *[Case(2, stage, kind, scales=True) for kind in ("adamw", "schedule_free", "muon") for stage in (0, 3)],
    *[Case(world, stage, engine=FP16) for world, stage in ((1, 0), (2, 2))],
    *[Case(2, stage, engine=place) for place in (OFFLOAD, DISK) for stage in (2, 3)],
    *[Case(2, 1, "schedule_free", engine=OFFLOAD)],
    *[Case(2, stage, batch=7) for stage in (0, 1)],
    *[Case(2, stage, batch=7, engine={"micro_batch": 3}) for stage in (0, 2)],
]
MORE = [
    *[
        Case(world, stage, kind)
        for kind in ("schedule_free", "muon")
        for world, stage in ((1, 1), (1, 2), (1, 3), (2, 2))
    ],
    *[Case(2, 1, kind, scales=True) for kind in ("adamw", "schedule_free", "muon")],
    *[Case(world, stage, engine=FP16) for world, stage in ((1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 3))],
    *[Case(2, 1, engine=OFFLOAD)],
]
"""The other combinations."""


class Loss(torch.nn.Module):
    """A fixed network under a loss, with a weight that two ranks cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(8, WIDTH)
        self.hidden = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Linear(WIDTH, WIDTH), torch.nn.LayerNorm(WIDTH))
        self.last = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Linear(WIDTH, 7))
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                scale = 0.05 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
                parameter.copy_(normal(0, name, shape=tuple(parameter.shape)) * scale)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """The mean loss of rows ``[B,8]``, each times its weight."""
        losses = (self.last(self.hidden(self.embed(x))) - 3 * x.flip(1)[:, :7]).square().mean(1)
        return (losses * weight).mean()


def engine_of(case: Case) -> Engine:
    """A fresh one."""
    optimizer = TypeAdapter(OptimizerConfig).validate_python(
        {"kind": case.optimizer, "learning_rate": RATES[case.optimizer]}
    )
    config = EngineConfig.model_validate({"precision": "fp32", **case.engine, "zero_stage": case.stage})
    scales = {"hidden.1.weight": 0.25} if case.scales else {}
    return Engine(Loss(), optimizer, config, case.batch, scales)


def train(engine: Engine, case: Case, first: int, last: int, ema: Ema) -> list[float]:
    """The mean loss of every step over all rows."""
    told = []
    rank, world = dist.get_rank(), dist.get_world_size()
    places = engine.micro_batch * engine.accumulation
    for step in range(first, last):
        rows = normal(0, "batch", step, shape=(case.batch, 8))
        mine = rows[rank * case.batch // world : (rank + 1) * case.batch // world]
        weight = torch.zeros(places)
        weight[: len(mine)] = places * world / case.batch
        filled = torch.cat([mine, mine[:1].expand(places - len(mine), 8)])
        pairs = zip(filled.split(engine.micro_batch), weight.split(engine.micro_batch), strict=True)
        loss, _ = engine.step(iter(pairs), RATES[case.optimizer], CLOCK)
        dist.all_reduce(loss)
        told.append(float(loss) / world)
        ema.update(step)
    return told


def different(one: WholeState, other: WholeState) -> list[str]:
    """The tensors and numbers in which two states differ by as much as a bit."""
    tensors = [
        f"{group} {name}"
        for group, found in one.groups.items()
        for name, tensor in found.items()
        if not torch.equal(tensor, other.groups[group][name])
    ]
    return tensors + [name for name, value in one.scalars.items() if other.scalars[name] != value]


def run(case: Case) -> dict[str, Any]:
    """Train, and go on from the middle with another engine."""
    engine = engine_of(case)
    ema = Ema(EmaConfig(decay=0.9), engine.weights, engine.device)
    told = train(engine, case, 0, MIDDLE, ema)
    middle = state_of(engine, ema)
    told += train(engine, case, MIDDLE, STEPS, ema)
    end = state_of(engine, ema)
    again = engine_of(case)
    other = Ema(EmaConfig(decay=0.9), again.weights, again.device)
    again.take(middle)
    other.take(middle)
    loaded = different(middle, state_of(again, other))
    train(again, case, MIDDLE, STEPS, other)
    return {
        "losses": told,
        "groups": sorted(end.groups),
        "scalars": dict(end.scalars),
        "loaded_differs": loaded,
        "resumed_differs": different(end, state_of(again, other)),
        "metrics": engine.metrics(),
        "types": sorted({str(tensor.dtype) for found in end.groups.values() for tensor in found.values()}),
    }


def rank(number: int, world: int, port: int, out: Path, cases: list[Case]) -> None:
    """One training process."""
    torch.set_num_threads(1)
    connect(number, number, world, "127.0.0.1", port)
    for case in cases:
        if case.world == world:
            try:
                result = run(case)
            except DarkroomError as error:
                result = {"error": str(error)}
            if number == 0:
                (out / f"{case.name}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def main(words: list[str]) -> int:
    """Every case; 1 where a rank failed."""
    os.chdir(words[0])
    cases = [*CASES, *MORE] if "all" in words else CASES
    worlds = sorted({case.world for case in cases})
    return int(any(any(together(world, rank, Path(words[0]), cases)) for world in worlds))
