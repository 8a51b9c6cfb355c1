"""The processes of ``test_engine_options.py``: ``python option_ranks.py OUT`` imports DeepSpeed once and forks them.

World sizes, ZeRO stages, optimizers and options train a tiny network, in the combinations that stand for the others or
with ``--all`` in every one; another engine goes on from the middle; what came of it is written as JSON by rank 0.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from engine_ranks import CLOCK, WholeState, free_port, state_of

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
        options = "-".join(f"{key}={value}" for key, value in self.engine.items() if key != "offload")
        offload = "-offload" if "offload" in self.engine else ""
        scales = "-scales" if self.scales else ""
        return f"{self.optimizer}-world-{self.world}-zero-{self.stage}{offload}{scales}-rows-{self.batch}-{options}"


OFFLOAD, FP16 = {"offload": "cpu"}, {"precision": "fp16"}
CASES = [
    *[
        Case(world, stage, kind)
        for kind in ("schedule_free", "muon")
        for world, stage in ((1, 0), (2, 0), (2, 1), (2, 3))
    ],
    *[Case(world, 0, "adafactor") for world in (1, 2)],
    *[Case(2, stage, kind, scales=True) for kind in ("adamw", "schedule_free", "muon") for stage in (0, 3)],
    *[Case(world, stage, engine=FP16) for world, stage in ((1, 0), (2, 2))],
    *[Case(2, stage, engine=OFFLOAD) for stage in (2, 3)],
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


def launch(world: int, out: Path, cases: list[Case]) -> Iterator[multiprocessing.Process]:
    """Fork the ranks."""
    port = free_port()
    for number in range(world):
        process = multiprocessing.get_context("fork").Process(target=rank, args=(number, world, port, out, cases))
        process.start()
        yield process  # type: ignore[misc]


def main() -> int:
    """Every case; the exit code is that of the first rank that failed."""
    cases = [*CASES, *MORE] if "--all" in sys.argv else CASES
    for world in sorted({case.world for case in cases}):
        processes = list(launch(world, Path(sys.argv[1]), cases))
        for process in processes:
            process.join()
        failed = [process.exitcode for process in processes if process.exitcode]
        if failed:
            return abs(int(failed[0] or 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
