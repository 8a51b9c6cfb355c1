"""What keeping a run's state costs: ``python -m tests.benchmarks.checkpoint``.

Two processes train the demo's UNet on noise under ZeRO 1, each step copied into the node's memory and one in twenty
saved; then with torch's distributed checkpoint (DCP) saving as often, which keeps nothing in between. Then a state of
256 MiB is saved and loaded by both. The floors are a copy in memory, and writing and flushing as many bytes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from cluster.console import say
from tests.benchmarks.report import Row, parser, publish, row
from training import parallel
from training.checkpoint import CheckpointConfig, disk
from training.checkpoint.keeper import Keeper, Where
from training.checkpoint.memory import NodeMemory
from training.checkpoint.verified import newest_together
from training.data.storage import Folder
from training.ema import Ema, EmaConfig
from training.engine_config import EngineConfig
from training.engine_state import Part, StateSource
from training.noise import normal
from training.optim import AdamWConfig
from training.stopwatch import Stopwatch

WORLD, BATCH, RESOLUTION, EVERY = 2, 16, 32, 20
SAVED_AT = EVERY // 2  # the steps after it show what the writing beside takes of them
BIG = 256 << 20
Told = dict[str, list[float]]


class Denoiser(torch.nn.Module):
    """The demo's network under a squared error."""

    def __init__(self) -> None:
        from diffusers.models.unets.unet_2d import UNet2DModel

        super().__init__()
        self.network = UNet2DModel(
            sample_size=RESOLUTION,
            block_out_channels=(32, 64, 128),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=32,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The loss of rows ``[B,3,H,W]``."""
        predicted: torch.Tensor = self.network(x, torch.zeros(len(x))).sample
        return (predicted - x).square().mean()


class Big:
    """A state of one tensor of ``size`` bytes, shared evenly over the ranks; of none where it is 0."""

    def __init__(self, rank: int, size: int) -> None:
        count = size // 4
        start, stop = rank * count // WORLD, (rank + 1) * count // WORLD
        self._parts = [Part("weights", "x", (count,), start, torch.rand(stop - start))] if size else []

    def parts(self) -> list[Part]:
        """This rank's share."""
        return self._parts

    def scalars(self) -> dict[str, float]:
        """It counts nothing."""
        return {}

    def take(self, source: StateSource) -> None:
        """Read this rank's share."""
        for part in self._parts:
            part.values.copy_(source.read(part.group, part.name, part.start, part.start + part.values.numel()))


def timed(act: Callable[[], object]) -> float:
    """Seconds that it takes, on the slower rank."""
    dist.barrier()
    began = time.perf_counter()
    act()
    taken = torch.tensor(time.perf_counter() - began)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def keeper_of(folder: Path, rank: int, engine: Any, average: Any, *, memory: bool) -> Keeper:
    """A run's keeper."""
    held = NodeMemory.open(folder, rank, {}) if memory else None
    where = Where(Folder.at(folder), rank, WORLD, "benchmark")
    return Keeper(where, CheckpointConfig(), engine, average, held if isinstance(held, NodeMemory) else None, print)


def state_dict(parts: list[Part], rank: int) -> dict[str, torch.Tensor]:
    """The same parts as DCP takes them."""
    return {f"{part.group}/{part.name}/{rank}": part.values for part in parts}


class Training:
    """Steps of the demo's network."""

    def __init__(self, rank: int, count: int) -> None:
        torch.manual_seed(0)
        self.count = count
        self.engine = parallel.Engine(Denoiser(), AdamWConfig(), EngineConfig(zero_stage=1), BATCH)
        self.ema = Ema(EmaConfig(), self.engine.weights, self.engine.device)
        self.clock = Stopwatch()
        self.rows = normal(0, "rows", rank, shape=(BATCH // WORLD, 3, RESOLUTION, RESOLUTION))

    def steps(self, after: Callable[[int], None], count: int | None = None) -> tuple[float, list[float]]:
        """Take them; returns the seconds of all, and of each ``after``."""
        waited = []

        def run() -> None:
            for done in range(1, (count or self.count) + 1):
                self.engine.step(iter([(self.rows,)]), 1e-4, self.clock)
                self.ema.update(done)
                began = time.perf_counter()
                after(done)
                waited.append(time.perf_counter() - began)

        return timed(run), waited


def stalls(rank: int, folder: Path, rounds: int, steps: int, told: Told) -> None:
    """Train with our checkpoints, with DCP's and with none, in turn."""
    training = Training(rank, steps)
    parts = [*training.engine.parts(), *training.ema.parts()]
    told["state_mib"] = [sum(part.values.nbytes for part in parts) / 2**20]
    copies = [torch.empty_like(part.values) for part in parts]
    training.steps(lambda _: None, 4)  # warm
    for number in range(rounds):
        keeper = keeper_of(folder / f"ours-{number}", rank, training.engine, training.ema, memory=True)

        def ours(done: int, keeper: Keeper = keeper) -> None:
            keeper.keep(done)
            keeper.commit(done, {})
            if done % EVERY == SAVED_AT:
                keeper.save(done, done * BATCH, {}, {}, first=lambda: None, wait=False)

        seconds, waited = training.steps(ours)
        told.setdefault("ours_s", []).append(seconds)
        told.setdefault("ours_stall", []).append(sum(waited) / seconds)
        told.setdefault("copy_ms", []).append(1000 * statistics.median(waited))
        keeper.rewind()
        keeper.close(ended=True)
        running: list[Any] = []

        def peer(done: int, number: int = number, running: list[Any] = running) -> None:
            if done % EVERY == SAVED_AT:
                for before in running[-1:]:
                    before.result()
                place = folder / f"dcp-{number}-{done}"
                running.append(dcp_async_save(state_dict(parts, rank), checkpoint_id=place))

        seconds, waited = training.steps(peer)
        told.setdefault("peer_s", []).append(seconds)
        told.setdefault("peer_stall", []).append(sum(waited) / seconds)
        running[-1].result()
        seconds, _ = training.steps(lambda _: None)
        told.setdefault("bare_s", []).append(seconds)
        copied = timed(lambda: torch._foreach_copy_(copies, [part.values for part in parts]))
        told.setdefault("memcpy_ms", []).append(1000 * copied)
        if rank == 0:
            last = ", ".join(f"{name} {each[-1]:.4g}" for name, each in told.items())
            say(f"round {number + 1}: {last}")


def throughput(rank: int, folder: Path, told: Told) -> None:
    """Save and load a large state, once by each."""
    big, size = Big(rank, BIG), BIG / 2**20
    (part,) = big.parts()
    whole, place, raw = folder / "big", folder / "dcp-big", folder / f"raw-{rank}"
    keeper = keeper_of(whole, rank, big, Big(rank, 0), memory=False)
    peer = state_dict([part], rank)
    measured = {
        "save": lambda: keeper.save(1, 1, {}, {}, first=lambda: None, wait=True),
        "load": lambda: _load(big, Folder.at(whole)),
        "dcp_save": lambda: dcp_save(peer, checkpoint_id=place),
        "dcp_load": lambda: dcp_load(peer, checkpoint_id=place),
        "disk": lambda: _write_raw(raw, part.values),
    }
    for name, act in measured.items():
        told.setdefault(name, []).append(size / timed(act))
    keeper.close(ended=True)
    dist.barrier()
    for each in (whole, place) if rank == 0 else ():
        shutil.rmtree(each)
    dist.barrier()


def _load(big: Big, folder: Folder) -> None:
    found, refused = newest_together(folder)
    if found is None:
        raise RuntimeError(refused)
    big.take(found.source())


def _write_raw(path: Path, values: torch.Tensor) -> None:
    with path.open("xb") as file:
        values.numpy().tofile(file)
        os.fsync(file.fileno())
    path.unlink()
    disk.flush_folder(path.parent)


def rank_process(rank: int, port: int, folder: Path, rounds: int, steps: int) -> None:
    """One training process; rank 0 writes what it has measured."""
    torch.set_num_threads(1)
    parallel.connect(rank, rank, WORLD, "127.0.0.1", port)
    told: Told = {}
    stalls(rank, folder, rounds, steps, told)
    for _ in range(rounds):
        throughput(rank, folder, told)
    if rank == 0:
        (folder / "told.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def measure(rounds: int, steps: int) -> Told:
    """Everything, in processes of their own."""
    folder = Path(tempfile.mkdtemp(prefix="darkroom-benchmark-"))
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("fork")
        shared = (port, folder, rounds, steps)
        ranks = [context.Process(target=rank_process, args=(rank, *shared)) for rank in range(WORLD)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            sys.exit("a rank failed")
        told: Told = json.loads((folder / "told.json").read_text())
        return told
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def rows_of(told: Told) -> list[Row]:
    """The table."""
    stall = [100 * share for share in told["ours_stall"]]
    peer_stall = [100 * share for share in told["peer_stall"]]
    slower, peer_slower = (
        [100 * (seconds / bare - 1) for seconds, bare in zip(told[side], told["bare_s"], strict=True)]
        for side in ("ours_s", "peer_s")
    )
    copy, floor = told["copy_ms"], told["memcpy_ms"]
    save, peer_save = told["save"], told["dcp_save"]
    return [
        row("stall", "% of the run", stall, peer_stall, "DCP async_save", "<= 1", statistics.median(stall) <= 1),
        row("slower than without", "%", slower, peer_slower, "DCP async_save", "<= 2", statistics.median(slower) <= 2),
        row("copy into memory", "ms per step", copy, floor, "memcpy", "<= 2 x", _ratio(copy, floor) <= 2),
        row("save", "MiB/s", save, peer_save, "DCP", ">= 1 x", _ratio(save, peer_save) >= 1),
        row("save", "MiB/s", save, told["disk"], "write and flush", "-", met=True),
        row("load, verified", "MiB/s", told["load"], told["dcp_load"], "DCP, unverified", "-", met=True),
    ]


def _ratio(ours: list[float], peer: list[float]) -> float:
    return statistics.median(ours) / statistics.median(peer)


def main() -> None:
    """Measure and print."""
    made = parser(__doc__ or "")
    made.add_argument("--steps", type=int, default=EVERY, help="of each side in each round")
    options = made.parse_args()
    told = measure(options.rounds, options.steps)
    print(f"state of a rank {told['state_mib'][0]:.1f} MiB")
    publish(rows_of(told), options.json)


if __name__ == "__main__":
    main()
