"""The processes of ``test_parallel.py``: ``python engine_ranks.py OUT`` imports DeepSpeed once and forks the ranks.

Every combination of world size, ZeRO stage and accumulation trains the same tiny network on the same batches and
leaves what the tests compare, in files that rank 0 writes.
"""

from __future__ import annotations

import json
import multiprocessing
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from training.ema import Ema, EmaConfig
from training.engine_config import EngineConfig
from training.errors import CheckpointError, UsageError
from training.noise import normal
from training.optim import AdamWConfig, CosineSchedule
from training.parallel import Engine, connect, over_ranks
from training.ranks import on_every_rank, on_rank_zero, total

GLOBAL_BATCH = 8
STEPS, MIDDLE = 8, 4
STAGES, WORLDS, MICRO_BATCHES = (0, 1, 2, 3), (1, 2), (None, 2)
OPTIMIZER = AdamWConfig(learning_rate=5e-3, weight_decay=0.2)
EMA = EmaConfig(decay=0.9)
CLIP = 1.0
WIDTH = 320
"""Its square is above the 1e5 elements below which ZeRO 3 keeps a weight whole on every rank."""

SOURCES = ((2, 2), (1, 3), (1, 0), (2, 3))
"""(world, stage) of the states that are resumed everywhere."""


class TinyLoss(torch.nn.Module):
    """A fixed network under a loss. Seven outputs: a weight that two ranks cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        layers = [torch.nn.Linear(8, WIDTH), torch.nn.SiLU(), torch.nn.Linear(WIDTH, WIDTH), torch.nn.LayerNorm(WIDTH)]
        self.layers = torch.nn.Sequential(*layers, torch.nn.SiLU(), torch.nn.Linear(WIDTH, 7))
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                scale = 0.05 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
                parameter.copy_(normal(0, name, shape=tuple(parameter.shape)) * scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean loss of rows ``[B,8]``."""
        return (self.layers(x) - 3 * x.flip(1)[:, :7]).square().mean()


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
    return Engine(TinyLoss(), OPTIMIZER, config, GLOBAL_BATCH)


def train(engine: Engine, first: int, last: int, after: Callable[[int], None] = lambda _: None) -> list[list[float]]:
    """Steps ``first`` to ``last``; returns (loss, gradient norm) of each."""
    told = []
    for step in range(first, last):
        mine = batch(step)[dist.get_rank() :: dist.get_world_size()]
        loss, norm = engine.step(iter([(rows,) for rows in mine.split(engine.micro_batch)]), rate(step))
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


def whole_run(out: Path, stage: int, micro_batch: int | None, precision: str = "fp32") -> None:
    """Train to the end, keep the middle, the end and the average; then resume from the middle."""
    name = case(dist.get_world_size(), stage, micro_batch, precision)
    engine = fresh(stage, micro_batch, precision)
    ema = Ema(EMA, engine.owned())
    told = train(engine, 0, MIDDLE, ema.update)
    # as a run does at an evaluation: the average first, with nothing gathered before
    with ema.swapped():
        average = engine.weights()
    weights, optimizer = engine.weights(), engine.optimizer_state()
    write(out, name, weights=weights, optimizer=optimizer, ema=average)
    told += train(engine, MIDDLE, STEPS, ema.update)
    with ema.swapped():
        end_average = engine.weights()
    write(out, name, end=engine.weights(), end_optimizer=engine.optimizer_state(), end_ema=end_average, told=told)

    again = fresh(stage, micro_batch, precision)
    again.load(average, optimizer)  # as a run does: the average's turn first
    ema = Ema(EMA, again.owned())
    ema.restart()
    again.load(weights, optimizer)
    write(out, name, loaded=again.weights(), loaded_optimizer=again.optimizer_state())
    with ema.swapped():
        write(out, name, loaded_ema=again.weights())
    train(again, MIDDLE, STEPS, ema.update)
    with ema.swapped():
        write(out, name, resumed_ema=again.weights())
    write(out, name, resumed=again.weights())


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
        kept = out / case(*source, None)
        weights, optimizer = (load_file(f"{kept}.{group}.safetensors") for group in ("weights", "optimizer"))
        for stage in STAGES:
            engine = fresh(stage, 2)
            engine.load(weights, optimizer)
            name = f"{case(*source, None)}-into-{case(world, stage, 2)}"
            write(out, name, weights=engine.weights(), optimizer=engine.optimizer_state())
            write(out, name, told=train(engine, MIDDLE, STEPS), end=engine.weights())


def refusals(out: Path) -> None:
    """What loading another network's weights says, at every stage; and that nothing was loaded."""
    texts = []
    for stage in STAGES:
        engine = fresh(stage, None)
        before = engine.weights()
        state = {"step": torch.tensor(1.0)}
        missing = {name: tensor for name, tensor in before.items() if name != "layers.5.bias"}
        other = {**before, "layers.5.weight": torch.zeros(8, WIDTH)}
        for wrong in (missing, {**before, "layers.9.weight": torch.zeros(1)}, other):
            try:
                engine.load(wrong, state)
            except CheckpointError as error:
                texts.append(str(error))
        untouched = all(torch.equal(tensor, before[name]) for name, tensor in engine.weights().items())
        texts.append(f"untouched: {untouched}")
    write(out, f"world-{dist.get_world_size()}", refusals=texts)


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


def launch(world: int, job: str, out: Path) -> Iterator[multiprocessing.Process]:
    """Fork the ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for number in range(world):
        process = multiprocessing.get_context("fork").Process(target=rank, args=(number, world, port, job, out))
        process.start()
        yield process  # type: ignore[misc]


def main() -> int:
    """Both rounds in both world sizes; the exit code is that of the first rank that failed."""
    out = Path(sys.argv[1])
    for job in ("first", "second"):
        for world in WORLDS:
            processes = list(launch(world, job, out))
            for process in processes:
                process.join()
            failed = [process.exitcode for process in processes if process.exitcode]
            if failed:
                return abs(int(failed[0] or 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
