"""Weak scaling of the control path: 1 to 64 workers on this machine, each with a device that only sleeps.

Workers are Ray Train's, with our agents and forked ranks; loop, guards, accounts, node memory, metrics, reports and
sharded checkpoints are those of every run. What is left out is the device's work, so that 64 workers fit on one
machine: whatever a step takes longer than one worker's is the cost of having more. All workers share this machine's
cores, which on a cluster each would have for itself.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from cluster import pipeline
from cluster import stack as stacks
from cluster.console import say
from tests.benchmarks.report import Row, parser, publish
from tests.benchmarks.scaling_worker import PAUSE
from training import agent
from training.config import TrainConfig, parse
from training.data.build import build
from training.data.config import BuildConfig

STEPS, WARM_STEPS, SAVE_EVERY = 20, 5, 5
GOAL = 0.97
PER_WORKER_BYTES = 160 << 20
"""Of memory, for an agent and its rank: more workers than fit are not tried."""


def pictures(folder: Path, count: int) -> Path:
    """A data set of small pictures."""
    source = folder / "drawn"
    source.mkdir()
    for number in range(count):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        (source / f"{number:03d}.png").write_bytes(buffer.getvalue())
        (source / f"{number:03d}.txt").write_text("noise")
    build(source, folder / "data", BuildConfig(held_out=0.1))
    return folder / "data"


def recipe(data: Path, world: int) -> TrainConfig:
    """One row for each worker."""
    return parse(
        {
            "name": f"scaling-{world}",
            "steps": STEPS,
            "global_batch": world,
            "data": {"path": str(data), "threads": 1},
            "model": {"resolution": 8, "widths": [8], "attention": [False], "head_width": 8, "norm_groups": 4},
            "workers": {"count": world, "cpus": 0.01, "max_failures": 0},
            "evaluation": {"every_steps": 10**6, "images": 0},
            "checkpoint": {"every_steps": SAVE_EVERY},
        }
    )


def step_s(place: pipeline.Place, data: Path, world: int) -> float:
    """Seconds between two steps, everything between them included."""
    from training import ray_train

    config = recipe(data, world)
    run_dir = place.run_dir(config.name)
    began = time.monotonic()
    ray_train.fit(ray_train.TrainJob(config, run_dir, place.stack.mlflow_url), lambda _event: None)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    ended = {line["step"]: line["timestamp_ms"] / 1000 for line in lines if "learning_rate" in line}
    took = (ended[STEPS] - ended[WARM_STEPS]) / (STEPS - WARM_STEPS)
    parts = {
        name: statistics.mean(line[name] for line in lines if name in line) for name in lines[-2] if "time/" in name
    }
    told = ", ".join(f"{name.removeprefix('time/')} {1e3 * seconds:.1f} ms" for name, seconds in parts.items())
    say(f"{world} workers: {1e3 * took:.1f} ms a step ({told}); the run took {time.monotonic() - began:.0f} s")
    return took


def serve(path: Path, pause_s: float) -> subprocess.Popen[bytes]:
    """The fork server of ranks that sleep, where the agents will look for theirs."""
    path.unlink(missing_ok=True)  # the stack's own goes on, and nobody finds it
    command = [sys.executable, "-m", "tests.benchmarks.scaling_worker", str(path)]
    environment = {**os.environ, PAUSE: str(pause_s), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 120
    while not path.exists():
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the fork server did not start")
        time.sleep(0.1)
    return server


def measure(home: Path, worlds: list[int], pause_s: float) -> dict[int, float]:
    """Seconds of a step by number of workers."""
    stack = stacks.ensure(home, say)
    try:
        stacks.use(stack)
        pipeline.connect(stack)  # first: what imports Ray before settles for Ray without a token
        data = pictures(home, 2 * max(worlds))
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        server = serve(agent.socket_path(stack.ray_address.rsplit(":", 1)[-1], environment), pause_s)
        try:
            place = pipeline.Place(stack, home / "runs")
            return {world: step_s(place, data, world) for world in worlds}
        finally:
            server.terminate()
    finally:
        stacks.stop(home)


def main() -> None:
    """Measure and report."""
    made = parser(__doc__ or "")
    made.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64])
    made.add_argument("--pause-s", type=float, default=1.0, help="what the device is busy for with a step")
    options = made.parse_args()
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    free = psutil.virtual_memory().available // PER_WORKER_BYTES
    worlds = [world for world in options.workers if world <= free]
    if worlds != options.workers:
        say(f"memory for {free} workers")
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="dr-") as folder:
        found = measure(Path(folder), worlds, options.pause_s)
    one = found[worlds[0]]
    publish(
        [
            Row(
                f"weak scaling, {world} workers, {options.pause_s:g} s of device work a step",
                "ms a step",
                round(1e3 * seconds, 1),
                round(1e3 * one, 1),
                f"{worlds[0]} worker",
                round(one / seconds, 3),
                f"ratio of {worlds[0]} to {world} >= {GOAL}",
                one / seconds >= GOAL,
            )
            for world, seconds in found.items()
            if world != worlds[0]
        ],
        options.json,
    )


if __name__ == "__main__":
    main()
