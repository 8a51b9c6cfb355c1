"""Images/s of ``darkroom train`` and of a bare PyTorch loop that take turns of a few seconds on the same cores.

A machine whose speed drifts from minute to minute cannot compare two runs of minutes. Here both run at the same time
and one of them is always stopped (SIGSTOP), so that both see the same drift; the time in which a side was stopped does
not count. Ray's and MLflow's processes go on in either side's turns: what is compared is the training process, with
everything on, and the loop. ``tests.benchmarks.overhead`` compares whole runs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import training.data
from cluster import stack as stacks
from cluster.console import say
from cluster.processes import free_ports
from tests.benchmarks.overhead import GLOBAL_BATCH, MALLOC, WARM_STEPS, recipe, train
from tests.benchmarks.report import Row, parser, publish, row
from tests.faults.killed_run import training_process
from training.data.build import BuildConfig, build

TURN_S = 5.0
Turns = list[tuple[float, float]]


def ours_ended_s(run_dir: Path) -> list[float]:
    """When each of our steps ended."""
    log = run_dir / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    values = [json.loads(line) for line in lines if line.endswith("\n")]
    return [value["timestamp_ms"] / 1000 for value in values if "learning_rate" in value]


def bare_ended_s(log: Path) -> list[float]:
    """When each of the bare loop's steps ended."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [float(line) for line in lines if line.endswith("\n")]


def rate(ended_s: Sequence[float], turns: Turns) -> float:
    """Images/s while it was not stopped."""
    inside = [moment for moment in ended_s if turns[0][0] <= moment <= turns[-1][1]]
    first, last = inside[0], inside[-1]
    active = sum(max(0.0, min(last, end) - max(first, start)) for start, end in turns)
    return GLOBAL_BATCH * (len(inside) - 1) / active


def until(ready: Callable[[], bool], *processes: subprocess.Popen[bytes]) -> None:
    """Wait for it, as long as the processes run."""
    while not ready():
        failed = [process.args for process in processes if process.poll()]
        if failed:
            raise RuntimeError(f"{failed[0]} failed")
        time.sleep(0.05)


def measure(home: Path, number: int, written: Path, steps: int) -> tuple[float, float]:
    """Images/s of ours and of the bare loop."""
    name, out = f"turns-{number}", home / f"bare-{number}"
    out.mkdir()
    run_dir, log = home / "runs" / name, out / "ended_s"
    environment = {**os.environ, "DARKROOM_HOME": str(home), "COLUMNS": "400"}
    words = [sys.executable, "-m", "cluster", "train", str(written), "--set", f"name={name}"]
    mine = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: len(ours_ended_s(run_dir)) > WARM_STEPS, mine)
    victim = training_process(run_dir, 0)
    if victim is None:
        raise RuntimeError("the training process is not there")
    victim.send_signal(signal.SIGSTOP)
    words = [sys.executable, "-m", "tests.benchmarks.overhead_peers", "bare", str(written), str(out)]
    quiet = {**os.environ, **MALLOC, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    theirs = subprocess.Popen([*words, str(free_ports(1)[0])], env=quiet)
    sides = (victim, lambda: ours_ended_s(run_dir)), (theirs, lambda: bare_ended_s(log))
    turns: tuple[Turns, Turns] = ([], [])
    try:
        until(lambda: len(bare_ended_s(log)) > WARM_STEPS, theirs)
        theirs.send_signal(signal.SIGSTOP)
        while all(len(ended()) < steps - 1 for _, ended in sides):
            for (process, _), taken in zip(sides, turns, strict=True):
                process.send_signal(signal.SIGCONT)
                began = time.time()
                time.sleep(TURN_S)
                process.send_signal(signal.SIGSTOP)
                taken.append((began, time.time()))
    finally:
        for process, _ in sides:
            process.send_signal(signal.SIGCONT)
        mine.wait()
        theirs.wait()
    return rate(ours_ended_s(run_dir), turns[0]), rate(bare_ended_s(log), turns[1])


def main() -> None:
    """Measure and report."""
    made = parser(__doc__ or "")
    made.add_argument("--steps", type=int, default=60, help="of each run")
    made.set_defaults(rounds=1)
    options = made.parse_args()
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="dr-") as folder:
        home = Path(folder)
        stacks.use(stacks.ensure(home, say))
        try:
            data = home / "data"
            build(Path(training.data.__path__[0]) / "demo" / "smileys.tar", data, BuildConfig())
            train(home, recipe(home, data, 1), "warm")
            written = recipe(home, data, options.steps)
            rates = [measure(home, number, written, options.steps) for number in range(options.rounds)]
        finally:
            stacks.stop(home)
    mine, theirs = [each for each, _ in rates], [each for _, each in rates]
    made_row: Row = row(
        "training process, everything on", "images/s", mine, theirs, "bare PyTorch loop", ">= 0.99", True
    )
    ratio = made_row.ratio or 0.0
    publish([Row(**{**vars(made_row), "met": ratio >= 0.99})], options.json)


if __name__ == "__main__":
    main()
