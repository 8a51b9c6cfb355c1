"""Images per second from JPEG shards to batches, two workers, beside bare decoding and other people's loaders.

The floor is simplejpeg alone, decoding the same pictures from memory on all cores. Then how long the first batch at
position 10 million of a billion samples takes, and how much memory. MosaicML streaming takes part where it is
installed, see ``tests/benchmarks/requirements.txt``.

    python -m tests.benchmarks.loader --rounds 5 --json loader.json
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.benchmarks import loader_data
from tests.benchmarks.loader_sides import BILLION, FAR, ROWS, schedule
from tests.benchmarks.report import Row, parser, publish, row

PICTURES = {256: (800, 8, 12_800), 512: (300, 7, 4_000)}
"""By side: different pictures, copies of each, and how many are decoded in one measurement."""
PEERS = {
    "floor": "bare simplejpeg",
    "processes": "our reader in processes, nothing handed over",
    "webdataset_default": "WebDataset",
    "webdataset_simplejpeg": "WebDataset + simplejpeg",
    "streaming": "MosaicML streaming",
}
GOALS = {"floor": 0.95, "processes": 0.95, "webdataset_default": 2.5}


def measure(side: str, folder: Path, pixels: int, images: int, peers: Path | None) -> dict[str, float]:
    """One side's figures."""
    words = [side, str(folder), str(pixels), str(images), *([str(peers)] if peers else [])]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.loader_sides", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    line = next(each for each in done.stdout.splitlines() if each.startswith("FIGURES "))
    found: dict[str, float] = json.loads(line.removeprefix("FIGURES "))
    return found


def compare(folder: Path, pixels: int, rounds: int, peers: Path | None) -> list[Row]:
    """All sides in turn, as often as asked."""
    different, copies, images = PICTURES[pixels]
    loader_data.write(folder, pixels, different, copies)
    names = [name for name in PEERS if name != "streaming" or peers]
    if peers:
        measure("to_streaming", folder, pixels, images, peers)
    rates: dict[str, list[float]] = {name: [] for name in ("ours", *names)}
    memory: list[dict[str, float]] = []
    for number in range(rounds):
        for name, values in rates.items():
            figures = measure(name, folder, pixels, images, peers)
            values.append(figures["rate"])
            memory += [figures] if name == "ours" else []
        told = ", ".join(f"{name} {values[-1]:.0f}" for name, values in rates.items())
        print(f"  {pixels} px, round {number + 1}, load {os.getloadavg()[0]:.1f}: {told}", flush=True)
    rows = []
    for name in names:
        ratio = statistics.median(rates["ours"]) / statistics.median(rates[name])
        goal = GOALS.get(name)
        told, met = (f">= {goal} x", ratio >= goal) if goal else ("faster", ratio > 1)
        rows.append(row(f"loader, {pixels} px", "images/s", rates["ours"], rates[name], PEERS[name], told, met))
    grown, bound = max(each["grown_mb"] for each in memory), memory[0]["bound_mb"]
    # a picture on its way on each thread, and the threads' own stacks and arenas, beside the batches
    rows.append(
        row(
            f"loader, {pixels} px: memory",
            "MB",
            [grown],
            [bound],
            "its own bound",
            "<= bound + 64",
            grown <= bound + 64,
        )
    )
    return rows


def far(folder: Path, like: Path, pixels: int, rounds: int) -> list[Row]:
    """The first batch at a far position."""
    plan = schedule(BILLION, pixels)
    batches = [plan.batch(FAR // ROWS + number).ids for number in range(4)]
    loader_data.write_billion(folder, like, BILLION, np.concatenate(batches))
    found = [measure("resume", folder, pixels, 0, None) for _ in range(rounds)]
    seconds, grown = [each["seconds"] for each in found], [each["grown_mb"] for each in found]
    name = "resume at 10 million of a billion"
    return [
        row(name, "s", seconds, [], "", "< 1", max(seconds) < 1),
        row(f"{name}: memory", "MB", grown, [], "", "< 200", max(grown) < 200),
    ]


def main() -> None:
    """Measure and report."""
    made = parser(__doc__ or "")
    made.add_argument("--peers", type=Path, help="folder with MosaicML streaming (tests/benchmarks/requirements.txt)")
    options = made.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="darkroom-loader-") as name:
        for pixels in PICTURES:
            rows += compare(Path(name) / str(pixels), pixels, options.rounds, options.peers)
        rows += far(Path(name) / "billion", Path(name) / "256", 256, options.rounds)
        shutil.rmtree(Path(name) / "billion")
    publish(rows, options.json)
    if not options.peers:
        print("MosaicML streaming: not installed, see tests/benchmarks/requirements.txt")


if __name__ == "__main__":
    main()
