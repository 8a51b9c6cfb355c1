"""Seconds from typing ``darkroom train`` on a warm stack to its first optimizer step, beside stock Ray Train.

The floor is the step itself: the training process, once forked, takes what "process forked" to "first step" shows.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import training.data
from cluster import stack as stacks
from cluster.console import say
from tests.benchmarks.report import arguments, publish, row
from training.data.build import BuildConfig, build


def ours(home: Path, data: Path, number: int) -> tuple[float, float]:
    """Seconds to the first step, and from the fork to it."""
    settings = (f"name=startup-{number}", "steps=1", "evaluation.images=0")
    words = ["train", "smileys", "--data", str(data), *(word for each in settings for word in ("--set", each))]
    done = subprocess.run(
        [sys.executable, "-m", "cluster", *words],
        env={**os.environ, "DARKROOM_HOME": str(home), "COLUMNS": "400"},
        capture_output=True,
        text=True,
        check=True,
    )
    account = next(line for line in done.stderr.splitlines() if line.startswith("first step after"))
    print(" ", account)
    total = re.search(r"after ([\d.]+) s", account)
    forked = account.partition("process forked")[2]
    parts = [float(part) for part in re.findall(r"(?:joined|built|first step) ([\d.]+)", forked)]
    return float(total.group(1)) if total else float("nan"), sum(parts)


def stock(home: Path) -> float:
    """The same with Ray's own ``TorchTrainer``."""
    began = time.time()
    program = Path(__file__).with_name("stock_ray_train.py")
    done = subprocess.run(
        [sys.executable, str(program), str(home / "stock")], capture_output=True, text=True, check=True, env=os.environ
    )
    return float(done.stdout.split("FIRST")[1]) - began


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__ or "")
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="dr-") as folder:
        home, data = Path(folder), Path(folder) / "data"
        build(Path(training.data.__path__[0]) / "demo" / "smileys.tar", data, BuildConfig())
        stacks.use(stacks.ensure(home, say))
        try:
            ours(home, data, -1)  # fills the caption cache
            mine, forks, theirs = [], [], []
            for number in range(options.rounds):
                total, forked = ours(home, data, number)
                mine.append(total)
                forks.append(forked)
                theirs.append(stock(home))
        finally:
            stacks.stop(home)
    publish(
        [
            row(
                "train: to the first step",
                "s",
                mine,
                theirs,
                "stock TorchTrainer",
                "< 12",
                statistics.median(mine) < 12,
            ),
            row("training process: fork to first step", "s", forks, [], "", "< 2", statistics.median(forks) < 2),
        ],
        options.json,
    )


if __name__ == "__main__":
    main()
