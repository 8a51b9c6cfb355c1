"""The program of ``test_parallel.py``: engines in processes of one world and of two.

Every combination of world size, ZeRO stage and accumulation trains the same tiny network on the same batches and
leaves what the tests compare, in files that rank 0 writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.training.forked import together
from training.ema import Ema, EmaConfig
from training.engine_config import EngineConfig
from training.engine_state import gather
from training.errors import CheckpointError, UsageError
from training.noise import normal
from training.optim import AdamWConfig, CosineSchedule
from training.parallel import Engine, connect, over_ranks
from training.ranks import on_every_rank, on_rank_zero, total
from training.self_tests.ground import WIDTH, Probe
from training.stopwatch import Stopwatch

GLOBAL_BATCH = 8
STEPS, MIDDLE = 8, 4
STAGES, WORLDS, MICRO_BATCHES = (0, 1, 2, 3), (1, 2), (None, 2)
GROUPS = ("weights", "ema", "optimizer.exp_avg", "optimizer.exp_avg_sq")
OPTIMIZER = AdamWConfig(learning_rate=5e-3, weight_decay=0.2)
EMA = EmaConfig(decay=0.9)
CLIP = 1.0

CLOCK = Stopwatch()

SOURCES = ((2, 2), (1, 3), (1, 0), (2, 3))
"""(world, stage) of the states that are resumed everywhere."""


class WholeState:
    """A state held as whole tensors by group and name."""

    def __init__(self, groups: Mapping[str, Mapping[str, Tensor]], scalars: Mapping[str, float]) -> None:
        self.groups, self.scalars = groups, scalars

    def shapes(self, group: str) -> dict[str, tuple[int, ...]]:
        """Of the whole tensors."""
        return {name: tuple(tensor.shape) for name, tensor in self.groups.get(group, {}).items()}

    def read(self, group: str, name: str, start: int, stop: int) -> Tensor:
        """A stretch of a tensor."""
        return self.groups[group][name].flatten()[start:stop].clone()


def batch(step: int) -> torch.Tensor:
    """The global batch of a step, ``[8,8]``."""
    return normal(0, "batch", step, shape=(GLOBAL_BATCH, 8))


def rate(step: int) -> float:
    """The learning rate of a step."""
    return OPTIMIZER.learning_rate * CosineSchedule(warmup_steps=2).factor(step, STEPS)


def case(world: int, stage: int, micro_batch: int | None, precision: str = "fp32") -> str:
    """The name of a combination."""
    return f"world-{world}-zero-{stage}-micro-{micro_batch}-{precision}"


def fresh(stage: int, micro_batch: int | None, precision: Any = "fp32") -> Engine:
    """An engine over fresh weights."""
    config = EngineConfig(zero_stage=stage, precision=precision, micro_batch=micro_batch, gradient_clip=CLIP)  # type: ignore[arg-type]
    return Engine(Probe(), OPTIMIZER, config, GLOBAL_BATCH)


def train(engine: Engine, first: int, last: int, after: Callable[[int], None] = lambda _: None) -> list[list[float]]:
    """Steps ``first`` to ``last``; returns (loss, gradient norm) of each."""
    told = []
    for step in range(first, last):
        mine = batch(step)[dist.get_rank() :: dist.get_world_size()]
        loss, norm = engine.step(iter([(rows,) for rows in mine.split(engine.micro_batch)]), rate(step), CLOCK)
        dist.all_reduce(loss)
        told.append([float(loss) / dist.get_world_size(), norm])
        after(step)
    return told


def write(out: Path, name: str, **groups: Any) -> None:
    """Rank 0 keeps groups of tensors, and lists as JSON."""
    if dist.get_rank() == 0:
        for group, content in groups.items():
            if isinstance(content, dict):
                save_file(content, out / f"{name}.{group}.safetensors")
            else:
                (out / f"{name}.{group}.json").write_text(json.dumps(content))


def state_of(engine: Engine, ema: Ema) -> WholeState:
    """Whole tensors of everything; every part is looked at: each element is in one part of one rank."""
    groups: dict[str, list[Any]] = {}
    for part in [*engine.parts(), *ema.parts()]:
        groups.setdefault(part.group, []).append(part)
    known: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(known, list(groups))
    names = sorted({name for each in known for name in each})
    counts = torch.tensor([float(sum(part.values.numel() for part in groups.get(name, []))) for name in names])
    dist.all_reduce(counts)
    whole = {name: gather(groups.get(name, []), engine.device) for name in names}
    sizes = [sum(tensor.numel() for tensor in tensors.values()) for tensors in whole.values()]
    assert counts.tolist() == sizes, "an element is held twice or nowhere"
    return WholeState(whole, engine.scalars())


def keep(out: Path, name: str, when: str, state: WholeState) -> None:
    """Rank 0 keeps a whole state."""
    write(out, name, **{f"{when}_{group}": tensors for group, tensors in state.groups.items()})
    write(out, name, **{f"{when}_scalars": [dict(state.scalars)]})


def kept(out: Path, name: str, when: str) -> WholeState:
    """A state that was kept."""
    groups = {group: load_file(out / f"{name}.{when}_{group}.safetensors") for group in GROUPS}
    return WholeState(groups, json.loads((out / f"{name}.{when}_scalars.json").read_text())[0])


def whole_run(out: Path, stage: int, micro_batch: int | None, precision: str = "fp32") -> None:
    """Train to the end, keep the middle, the end and the average; then resume from the middle."""
    name = case(dist.get_world_size(), stage, micro_batch, precision)
    engine = fresh(stage, micro_batch, precision)
    ema = Ema(EMA, engine.weights, engine.device)
    told = train(engine, 0, MIDDLE, ema.update)
    middle = state_of(engine, ema)
    keep(out, name, "middle", middle)
    told += train(engine, MIDDLE, STEPS, ema.update)
    keep(out, name, "end", state_of(engine, ema))
    write(out, name, told=told)

    again = fresh(stage, micro_batch, precision)
    ema = Ema(EMA, again.weights, again.device)
    again.take(middle)
    ema.take(middle)
    keep(out, name, "loaded", state_of(again, ema))
    replicas = [tensor for name, tensor in _replicas(again)]
    write(out, name, replicas_differ=[_differ(replicas)])
    train(again, MIDDLE, STEPS, ema.update)
    keep(out, name, "resumed", state_of(again, ema))


def _replicas(engine: Engine) -> list[tuple[str, Tensor]]:
    """What every rank holds whole: under ZeRO 3 the small weights."""
    return [(name, weight.data) for name, weight in engine.names.items() if engine.stage != 3 or weight.ds_persist]


def _differ(replicas: list[Tensor]) -> int:
    """In how many bits the ranks' copies differ."""
    bits = torch.cat([tensor.flatten() for tensor in replicas]).view(torch.int32)
    lowest, highest = bits.clone(), bits.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return int((lowest != highest).sum())


def first_round(out: Path) -> None:
    """Every whole run of this world size."""
    for stage in STAGES:
        for micro_batch in MICRO_BATCHES:
            whole_run(out, stage, micro_batch)
    whole_run(out, 1, 2, "bf16")
    refusals(out)
    shared_rows(out)
    common_decisions(out)


def second_round(out: Path) -> None:
    """Resume states of other stages and world sizes."""
    world = dist.get_world_size()
    for source in SOURCES:
        state = kept(out, case(*source, None), "middle")
        for stage in STAGES:
            engine = fresh(stage, 2)
            ema = Ema(EMA, engine.weights, engine.device)
            engine.take(state)
            ema.take(state)
            name = f"{case(*source, None)}-into-{case(world, stage, 2)}"
            keep(out, name, "loaded", state_of(engine, ema))
            write(out, name, told=train(engine, MIDDLE, STEPS), end_weights=engine.whole("weights"))


def refusals(out: Path) -> None:
    """What loading another network's weights says, at every stage; and that nothing was loaded."""
    texts = []
    for stage in STAGES:
        engine = fresh(stage, None)
        groups = {group: engine.whole(group) for group in GROUPS if group != "ema"}
        before = groups["weights"]
        missing = {name: tensor for name, tensor in before.items() if name != "layers.5.bias"}
        other = {**before, "layers.5.weight": torch.zeros(8, WIDTH)}
        wrong = (missing, {**before, "layers.9.weight": torch.zeros(1)}, other)
        states = [WholeState({**groups, "weights": weights}, engine.scalars()) for weights in wrong]
        texts += [_refusal(engine, state) for state in states]
        texts.append(_refusal(engine, WholeState({"weights": before}, engine.scalars())))
        texts.append(_refusal(engine, WholeState(groups, {})))
        untouched = all(torch.equal(tensor, before[name]) for name, tensor in engine.whole("weights").items())
        texts.append(f"untouched: {untouched}")
    write(out, f"world-{dist.get_world_size()}", refusals=texts)


def _refusal(engine: Engine, state: WholeState) -> str:
    try:
        engine.take(state)
    except CheckpointError as error:
        return str(error)
    return "taken"


def shared_rows(out: Path) -> None:
    """Work shared over the ranks: more rows than ranks, as many, fewer."""
    seen: list[list[int]] = []

    def squares(rows: list[int]) -> torch.Tensor:
        seen.append(rows)
        return torch.tensor([[row**2, -row] for row in rows])

    results = {str(rows): over_ranks(rows, squares) for rows in (1, 2, 5)}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (seen, {name: tensor.tolist() for name, tensor in results.items()}))
    write(out, f"world-{dist.get_world_size()}", rows=everyone)


def common_decisions(out: Path) -> None:
    """What every rank gets of an action of rank 0 or of all, when it works and when it fails."""
    rank, world = dist.get_rank(), dist.get_world_size()

    def fail(error: Exception, here: bool = True) -> int:
        if here:
            raise error
        return rank

    got: dict[str, Any] = {
        "rank 0's": on_rank_zero(lambda: {"rank": rank}),
        "each its own": on_every_rank(lambda: rank),
        "total": total(1, rank),
    }
    for name, call in {
        "typed": lambda: on_rank_zero(lambda: fail(UsageError("no"))),
        "untyped": lambda: on_rank_zero(lambda: fail(OSError(28, "No space left on device"))),
        "the last rank": lambda: on_every_rank(lambda: fail(UsageError("of the last"), rank == world - 1)),
    }.items():
        try:
            got[name] = call()
        except Exception as error:  # noqa: BLE001  written down
            got[name] = f"{type(error).__name__}: {error}"
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, got)
    write(out, f"world-{world}", decisions=everyone)


def rank(number: int, world: int, port: int, job: str, out: Path) -> None:
    """One training process."""
    torch.set_num_threads(1)
    connect(number, number, world, "127.0.0.1", port)
    {"first": first_round, "second": second_round}[job](out)
    dist.destroy_process_group()


def main(words: list[str]) -> int:
    """Both rounds in both world sizes; 1 where a rank failed."""
    return int(any(any(together(world, rank, job, Path(words[0]))) for job in ("first", "second") for world in WORLDS))
