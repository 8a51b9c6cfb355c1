"""Seconds from the SIGKILL of one of two workers to the next step that had never been done, and what it costs.

A training process is replaced in place; a Ray worker by Ray Train, beside stock Ray Train's own loop with checkpoints.
The network is the tests' smallest, so that the figures are of the recovery and not of the steps.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import training.data
from cluster import stack as stacks
from cluster.console import say
from tests.benchmarks.report import Row, arguments, publish, row
from tests.faults.killed_run import TINY, Killer, train, training_process
from training.data.audit import audit
from training.data.build import BuildConfig, build
from training.ray_agent import ENTERED

SETTINGS = ("workers.count=2", "workers.cpus=0.45", "checkpoint.every_steps=20", "evaluation.every_steps=100000")
KILLS = 8
"""Of training processes, in each round."""
EVERY_S = 30.0
GOODPUT_S = 90.0


class Moments:
    """When each step was done for the first time; ends a process now and then.

    Args:
        kill: ends something of the run; it is asked at each step, and says whether it has.
    """

    def __init__(self, kill: Callable[[int, float], bool]) -> None:
        self._kill = kill
        self.done: dict[int, float] = {}
        self._groups: dict[float, float] = {}
        self.killed_s: list[float] = []
        self.agents: list[int] = []

    def __call__(self, event: dict[str, Any]) -> None:
        """Take an event of the run."""
        if event["event"] == "mark" and event["name"] == ENTERED:
            self.agents.append(event["pid"])
        elif event["event"] == "step" and event["step"] not in self.done:
            self.done[event["step"]] = event["time_s"]
            self._groups.setdefault(event["attempt"], event["time_s"])
            now = time.time()
            if self._kill(event["step"], now):
                self.killed_s.append(now)

    @property
    def step_s(self) -> float:
        """Of an undisturbed step."""
        moments = sorted(self.done.values())
        return statistics.median(after - before for before, after in itertools.pairwise(moments))

    def restarted_s(self) -> float:
        """From the kill to the first new step of the second worker group; the first one may still leave in order."""
        return sorted(self._groups.values())[1] - self.killed_s[0]


def processes(home: Path, data: Path, number: int) -> tuple[list[float], int, int, float]:
    """Kills of training processes: seconds of each, the most steps redone after one, samples that are wrong; step."""
    run_dir = home / f"processes-{number}"
    killer, moments = Killer(run_dir, KILLS, seed=number), Moments(lambda *_: False)

    def on_event(event: dict[str, Any]) -> None:
        moments(event)
        killer(event)

    train(run_dir, data, on_event, *SETTINGS, f"steps={KILLS * 10 + 10}")
    if len(killer.recovery_s) != KILLS:
        raise RuntimeError(f"{len(killer.recovery_s)} of {KILLS} kills came about: {killer.told}")
    report = audit(run_dir, str(data))
    return killer.recovery_s, max(killer.redone), report.lost + report.duplicated + len(report.findings), moments.step_s


def ray_worker(home: Path, data: Path, number: int) -> tuple[float, int]:
    """The kill of a Ray worker: seconds, and samples that are wrong."""
    run_dir = home / f"worker-{number}"

    def kill(step: int, _now: float) -> bool:
        if step < 30 or moments.killed_s:
            return False
        os.kill(moments.agents[0], 9)
        return True

    moments = Moments(kill)
    train(run_dir, data, moments, *SETTINGS, "steps=300")
    report = audit(run_dir, str(data))
    return moments.restarted_s(), report.lost + report.duplicated + len(report.findings)


def stock(home: Path, number: int) -> tuple[float, int]:
    """The same with Ray's own ``TorchTrainer``: seconds, and steps done again."""
    program, folder = Path(__file__).with_name("stock_recovery.py"), home / f"stock-{number}"
    done = subprocess.run(
        [sys.executable, str(program), str(TINY), str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    seconds, redone = done.stdout.split("RECOVERY")[1].split()
    return float(seconds), int(redone)


def goodput(home: Path, data: Path, step_s: float) -> float:
    """The share of the time in which a run with a kill every 30 s does steps that last."""
    run_dir = home / "goodput"

    def kill(_step: int, now: float) -> bool:
        since = moments.killed_s[-1] if moments.killed_s else min(moments.done.values()) - EVERY_S / 2
        victim = training_process(run_dir, len(moments.killed_s) % 2) if now - since >= EVERY_S else None
        if victim is None:
            return False
        victim.kill()
        return True

    moments = Moments(kill)
    train(run_dir, data, moments, *SETTINGS, f"steps={int(GOODPUT_S / step_s)}")
    first, last = min(moments.done.values()), max(moments.done.values())
    say(f"goodput: {len(moments.killed_s)} kills in {last - first:.0f} s")
    return (len(moments.done) - 1) * moments.step_s / (last - first)


def measure(home: Path, rounds: int) -> list[Row]:
    """Both sides in turns."""
    data = home / "data"
    build(Path(training.data.__path__[0]) / "demo" / "smileys.tar", data, BuildConfig())
    killed: list[float] = []
    most, wrong, steps = 0, 0, []
    mine, theirs, again = [], [], []
    for number in range(rounds):
        seconds, redone, bad, step_s = processes(home, data, number)
        killed += seconds
        most, wrong = max(most, redone), wrong + bad
        steps.append(step_s)
        came_s, bad = ray_worker(home, data, number)
        mine.append(came_s)
        wrong += bad
        peer_s, peer_again = stock(home, number)
        theirs.append(peer_s)
        again.append(peer_again)
        middle = statistics.median(seconds)
        say(f"round {number + 1}: process {middle:.2f} s, worker {came_s:.2f} s, stock {peer_s:.2f} s")
    share = goodput(home, data, statistics.median(steps))
    late = statistics.quantiles(killed, n=20, method="inclusive")[-1]
    half = statistics.median(mine) <= statistics.median(theirs) / 2
    name, peer = "training process killed: to the next new step", "stock Ray Train"
    worker = "Ray worker killed: to the next new step"
    return [
        row(f"{name}, median of {len(killed)}", "s", killed, theirs, peer, "<= 2", statistics.median(killed) <= 2),
        row(f"{name}, p95", "s", [late], theirs, peer, "<= 2", late <= 2),
        row(worker, "s", mine, theirs, peer, "<= half of stock", half),
        row("most steps redone after a kill", "steps", [most], [float(max(again))], peer, "<= 1", most <= 1),
        Row("samples lost or duplicated", "samples", wrong, None, "", None, "0", not wrong),
        Row("goodput at a kill every 30 s", "share", round(share, 3), None, "", None, ">= 0.9", share >= 0.9),
    ]


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__ or "")
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="dr-") as folder:
        home = Path(folder)
        stacks.use(stacks.ensure(home, say))
        import ray  # it reads the stack's environment when it is imported

        ray.init(log_to_driver=False, namespace="recovery")
        try:
            rows = measure(home, options.rounds)
        finally:
            ray.shutdown()  # first: it ends this process when its cluster goes
            stacks.stop(home)
    publish(rows, options.json)


if __name__ == "__main__":
    main()
