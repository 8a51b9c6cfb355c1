"""Images/s of ``darkroom train`` with everything on, beside a bare PyTorch loop and diffusers' through accelerate.

All train the same network from the same weights on the same batches, one worker of two threads, in turns. Ours runs
as anybody's does: Ray Train, agent, DeepSpeed, MLflow, guards, the account of its data, its state kept in memory
at every step and on disk every 20. The peers get their batches from memory, and malloc set as our fork server sets
it. The floor is the bare loop's own forward and backward. The bare loop must end in our weights, bit for bit.

Ray's own processes take their share of a small machine, whoever trains: beside the bare loop stand our training
process without Ray, and the bare loop itself in a worker of stock Ray Train.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import yaml

import training.data
from cluster import stack as stacks
from cluster.console import say
from cluster.processes import free_ports
from tests.benchmarks.report import Row, parser, publish, row
from training import agent
from training.config import load_recipe
from training.data.build import BuildConfig, build
from training.spec import WorkerSpec

GLOBAL_BATCH = 32
"""Half of the demo's: what a step costs besides its images weighs twice as much."""
WARM_STEPS = 5
"""Steps before the clock starts: caches fill, the allocator grows."""
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_TOP_PAD_": str(2**26)}
"""What ``training.fork_server`` sets: without it the peers would be slower for a reason that is not theirs."""
SIDES = ("ours", "bare", "without Ray", "stock", "accelerate")


def recipe(folder: Path, data: Path, steps: int) -> Path:
    """The demo's recipe, without pauses for evaluation."""
    values = {
        "base": "smileys",
        "steps": steps,
        "global_batch": GLOBAL_BATCH,
        "data": {"path": str(data)},
        "workers": {"count": 1, "threads": 2},
        "evaluation": {"every_steps": 10**6, "images": 0, "held_out_images": 8},
        "checkpoint": {"every_steps": 20},
    }
    path = folder / "overhead.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def rate(ended_s: list[float]) -> float:
    """Images/s after the warm-up, everything between two steps included."""
    return GLOBAL_BATCH * (len(ended_s) - 1 - WARM_STEPS) / (ended_s[-1] - ended_s[WARM_STEPS])


def train(home: Path, written: Path, name: str) -> Path:
    """``darkroom train``; returns the run's folder."""
    environment = {**os.environ, "DARKROOM_HOME": str(home), "COLUMNS": "400"}
    words = [sys.executable, "-m", "cluster", "train", str(written), "--set", f"name={name}"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return home / "runs" / name


def ours(run_dir: Path) -> float:
    """Images/s of ``darkroom train``."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line["timestamp_ms"] / 1000 for line in lines if "learning_rate" in line}
    return rate([steps[step] for step in sorted(steps)])


def without_ray(home: Path, written: Path, name: str) -> Path:
    """The training process alone, as an agent has it forked; returns the run's folder."""
    run_dir = home / "runs" / name
    (run_dir / "logs").mkdir(parents=True)
    config = load_recipe(str(written), [f"name={name}"])
    spec = WorkerSpec(
        config.model_dump(mode="json"),
        str(run_dir),
        0,
        0,
        1,
        "127.0.0.1",
        free_ports(1)[0],
        os.environ["MLFLOW_TRACKING_URI"],
    )
    process = agent.launch(agent.socket_path("overhead"), "train", asdict(spec), run_dir / "logs" / "rank-0.log")
    *_, last = process.events()
    if last["code"]:
        raise RuntimeError((run_dir / "logs" / "rank-0.log").read_text()[-3000:])
    return run_dir


def peer(side: str, written: Path, out: Path) -> tuple[float, float]:
    """Images/s of a peer, and those of its forward and backward alone."""
    out.mkdir()
    port = free_ports(1)[0]
    words = [sys.executable, "-m", "tests.benchmarks.overhead_peers", side, str(written), str(out), str(port)]
    environment = {**os.environ, **MALLOC, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    told = json.loads((out / "moments.json").read_text())
    floor_s = told["floor_s"][WARM_STEPS:]
    return rate(told["ended_s"]), GLOBAL_BATCH / statistics.mean(floor_s) if floor_s else float("nan")


def different(run_dir: Path, out: Path) -> list[str]:
    """The weights in which our run and the bare loop differ by as much as a bit."""
    import torch
    from safetensors.torch import load_file

    from training import checkpoint

    found, refused = checkpoint.newest(run_dir / "checkpoints")
    if found is None:
        raise RuntimeError(f"no checkpoint in {run_dir}: {refused}")
    mine, theirs = found.load("weights"), load_file(out / "weights.safetensors")
    names = {name.removeprefix("network."): tensor for name, tensor in mine.items()}
    if set(names) != set(theirs):
        return sorted(set(names) ^ set(theirs))
    return [name for name, tensor in names.items() if not torch.equal(tensor, theirs[name])]


def measure(home: Path, rounds: int, steps: int) -> list[Row]:
    """All sides in turns, another one first in every round."""
    data = home / "data"
    build(Path(training.data.__path__[0]) / "demo" / "smileys.tar", data, BuildConfig())
    rates: Mapping[str, list[float]] = {side: [] for side in (*SIDES, "floor")}
    unequal: list[str] = []
    short = recipe(home, data, 1)  # the fork servers start, and the captions' states are kept
    train(home, short, "warm")
    without_ray(home, short, "warm-without-ray")
    written = recipe(home, data, steps)
    for number in range(rounds):
        first = number % len(SIDES)
        for side in SIDES[first:] + SIDES[:first]:
            name = f"{side.replace(' ', '-')}-{number}"
            if side == "ours":
                run_dir = train(home, written, name)
                found = ours(run_dir)
            elif side == "without Ray":
                found = ours(without_ray(home, written, name))
            else:
                found, floor = peer(side, written, home / name)
                if side == "bare":
                    rates["floor"].append(floor)
            rates[side].append(found)
            say(f"round {number + 1}: {side} {found:.2f} images/s, load {os.getloadavg()[0]:.1f}")
        unequal = unequal or different(run_dir, home / f"bare-{number}")
    return [
        *_rows(rates),
        Row("weights other than the bare loop's", "tensors", len(unequal), None, "", None, "0", not unequal),
    ]


def _rows(rates: Mapping[str, list[float]]) -> list[Row]:
    """Of each pair the median of the rounds' ratios decides: what disturbs the machine disturbs both of a round."""

    def share(mine: str, theirs: str) -> float:
        ratios = sorted(a / b for a, b in zip(rates[mine], rates[theirs], strict=True))
        say(f"{mine} over {theirs}, each round: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
        return statistics.median(ratios)

    def against(name: str, mine: str, theirs: str, peer_name: str, least: float) -> Row:
        ratio = share(mine, theirs)
        made = row(name, "images/s", rates[mine], rates[theirs], peer_name, f">= {least}", ratio >= least)
        return replace(made, ratio=round(ratio, 3))

    whole = "training, everything on"
    return [
        against(whole, "ours", "bare", "bare PyTorch loop", 0.99),
        against("the same without Ray", "without Ray", "bare", "bare PyTorch loop", 0.99),
        against(whole, "ours", "stock", "bare loop in stock Ray Train", 0.99),
        against(whole, "ours", "accelerate", "accelerate", 1),
        row("bare loop", "images/s", rates["bare"], rates["floor"], "its forward and backward", "-", True),
    ]


def main() -> None:
    """Measure and report."""
    made = parser(__doc__ or "")
    made.add_argument("--steps", type=int, default=26, help=f"of each run; the first {WARM_STEPS} do not count")
    made.set_defaults(rounds=1)
    options = made.parse_args()
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="dr-") as folder:
        home = Path(folder)
        stacks.use(stacks.ensure(home, say))
        try:
            rows = measure(home, options.rounds, options.steps)
        finally:
            stacks.stop(home)
    publish(rows, options.json)


if __name__ == "__main__":
    main()
