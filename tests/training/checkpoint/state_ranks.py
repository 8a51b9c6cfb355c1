"""The program of ``test_worlds.py``: it keeps and brings back states in several worlds.

The state is hand-made: tensors of awkward shapes, cut over the ranks in three ways, as the stages of ZeRO do it. What
each rank has found wrong goes to ``OUT/told.json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.training.forked import together
from training.checkpoint import CheckpointConfig
from training.checkpoint.keeper import Keeper, Where
from training.checkpoint.memory import NodeMemory
from training.checkpoint.verified import newest_together
from training.data.storage import Folder
from training.engine_state import Part, StateSource
from training.errors import DarkroomError
from training.noise import normal

SHAPES = {"wide.weight": (7, 5), "bias": (3,), "cube": (2, 3, 2), "scale": (), "one": (1,), "none": (0, 4)}
WORLDS = (1, 2, 4)
CUTS = ("flat", "each", "whole")


def ranges(cut: str, rank: int, world: int) -> dict[str, tuple[int, int]]:
    """This rank's elements of each tensor."""
    found, at = {}, 0
    everything = sum(math.prod(shape) for shape in SHAPES.values())
    for number, (name, shape) in enumerate(SHAPES.items()):
        size = math.prod(shape)
        if cut == "flat":  # all tensors as one, cut into even shares, as stages 1 and 2 do
            low, high = rank * everything // world - at, (rank + 1) * everything // world - at
        elif cut == "each":  # each tensor by itself, the last share shorter, as stage 3 does
            share = -(-size // world)
            low, high = rank * share, (rank + 1) * share
        else:  # whole tensors dealt out, as stage 0 does
            low, high = (0, size) if number % world == rank else (0, 0)
        found[name] = (min(max(low, 0), size), min(max(high, 0), size))
        at += size
    return found


class State:
    """Some groups of one rank, at a step."""

    def __init__(self, groups: tuple[str, ...], cut: str) -> None:
        self.groups, self.count = groups, 0.0
        place = ranges(cut, dist.get_rank(), dist.get_world_size())
        self.list = [
            Part(group, name, SHAPES[name], start, torch.zeros(stop - start))
            for group in groups
            for name, (start, stop) in place.items()
        ]

    def at(self, step: int) -> State:
        """Be the state of that step."""
        self.count = float(step)
        for part in self.list:
            whole = normal(step, part.group, part.name, shape=(math.prod(part.shape),))
            part.values.copy_(whole[part.start : part.start + part.values.numel()])
        return self

    def differs(self, step: int) -> list[str]:
        """The parts that are not those of the step, bit for bit."""
        found = [] if self.count == step else [f"count {self.count}"]
        for part in self.list:
            whole = normal(step, part.group, part.name, shape=(math.prod(part.shape),))
            if not torch.equal(part.values, whole[part.start : part.start + part.values.numel()]):
                found.append(f"{part.group} {part.name}")
        return found

    def parts(self) -> list[Part]:
        """This rank's."""
        return self.list

    def scalars(self) -> dict[str, float]:
        """A counter."""
        return {"count": self.count}

    def take(self, source: StateSource) -> None:
        """Read this rank's parts."""
        self.count = source.scalars["count"]
        for part in self.list:
            if source.shapes(part.group) != SHAPES:
                raise TypeError(f"{part.group}: {source.shapes(part.group)}")
            part.values.copy_(source.read(part.group, part.name, part.start, part.start + part.values.numel()))


def keeper_at(folder: Path, cut: str, memory: NodeMemory | None = None) -> tuple[Keeper, State, State]:
    """A keeper of a fresh state."""
    engine, average = State(("weights", "optimizer.exp_avg"), cut), State(("ema",), cut)
    where = Where(Folder.at(folder), dist.get_rank(), dist.get_world_size(), "attempt")
    return Keeper(where, CheckpointConfig(), engine, average, memory, print), engine, average


def first_round(out: Path) -> dict[str, Any]:
    """Save from this world, cut in every way; keep in memory and bring back."""
    rank, world = dist.get_rank(), dist.get_world_size()
    wrong: dict[str, Any] = {}
    for cut in CUTS:
        memory = NodeMemory.open(out / f"run-{world}-{cut}", rank, {}, root=out)
        if isinstance(memory, str):
            raise TypeError(memory)
        keeper, engine, average = keeper_at(out / f"{world}-{cut}", cut, memory)
        for step in (1, 2, 3):
            engine.at(step), average.at(step)
            keeper.keep(step)
            keeper.commit(step, {"step": step})
        keeper.save(3, 24, {}, {}, first=lambda: None, wait=False)
        for step in (2, 3):
            keeper.restore(step)
            wrong[f"{cut} memory {step}"] = engine.differs(step) + average.differs(step)
        engine.at(9), average.at(9)
        wrong[f"{cut} rewound to"] = [] if keeper.rewind() == 3 else ["another step"]
        wrong[f"{cut} rewound"] = engine.differs(3) + average.differs(3)
        keeper.close(ended=True)
    wrong["a rank that cannot write"] = one_fails(out)
    return wrong


def one_fails(out: Path) -> list[str]:
    """The last rank's storage refuses: every rank is told the same, and no checkpoint is there."""
    rank, world = dist.get_rank(), dist.get_world_size()
    place = out / f"fails-{world}"
    if rank == 0:
        place.mkdir()
        (place / "file").touch()
    dist.barrier()
    keeper, engine, average = keeper_at(place / "file" if rank == world - 1 else place / "kept", "flat")
    engine.at(1), average.at(1)
    try:
        keeper.save(1, 8, {}, {}, first=lambda: None, wait=True)
    except DarkroomError as error:
        found = [] if "file" in str(error) and "Not a directory" in str(error) else [str(error)]
    else:
        found = ["nothing was told"]
    return found + [path.name for path in place.glob("*/step-*")]


def second_round(out: Path) -> dict[str, Any]:
    """Load in this world, cut in every way, what every world has saved."""
    wrong: dict[str, Any] = {}
    for source in WORLDS:
        for saved in CUTS:
            found, refused = newest_together(Folder.at(out / f"{source}-{saved}"))
            for cut in CUTS:
                keeper, engine, average = keeper_at(out / "unused", cut)
                if found is not None:
                    keeper.take(found.source())
                wrong[f"{source} {saved} into {cut}"] = engine.differs(3) + average.differs(3) + refused
                keeper.close(ended=True)
    return wrong


def process(rank: int, world: int, port: int, job: Callable[[Path], dict[str, Any]], out: Path) -> None:
    """One rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    told: list[Any] = [None] * world
    dist.all_gather_object(told, job(out))
    if rank == 0:
        (out / f"{job.__name__}-{world}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def main(words: list[str]) -> int:
    """Both rounds in all worlds; 1 where a rank failed."""
    jobs = (first_round, second_round)
    return int(any(any(together(world, process, job, Path(words[0]))) for job in jobs for world in WORLDS))
