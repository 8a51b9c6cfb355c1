"""The program of ``test_golden.py``: whole runs.

Every run is the real one: recipe, loader, engine, checkpoints and resume, of a tiny UNet on pictures drawn here.
``python -m tests.training.golden_ranks OUT --write`` makes the golden curve anew, which is right only when what a step
computes was changed on purpose.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.training.forked import together
from training import checkpoint, worker
from training.data.build import build
from training.data.config import BuildConfig

GOLDEN = Path(__file__).with_name("golden.json")
QUICK = ((1, 0), (2, 0), (2, 1), (2, 3), (4, 2))
"""World sizes and ZeRO stages; four processes that gather every weight anew take 20 s on two cores."""
STEPS, GLOBAL_BATCH = 7, 8
ENDED_AFTER = 4
"""The step after which an interrupted run is ended; the last durable checkpoint is then one step old."""


@dataclass(frozen=True)
class Ending:
    """How an attempt is ended before its time: a signal to one rank's own process, after a step.

    Attributes:
        signal: which.
        rank: whose.
        after: the step.
        saved: only once the checkpoint before it is in storage; it is written beside the steps.
    """

    signal: signal.Signals
    rank: int = 0
    after: int = ENDED_AFTER
    saved: bool = False


def recipe(data: Path, stage: int, **sections: Any) -> dict[str, Any]:
    """The tiny recipe, in fp32."""
    return {
        "name": "golden",
        "seed": 7,
        "steps": STEPS,
        "global_batch": GLOBAL_BATCH,
        "data": {"path": str(data)},
        "model": {"resolution": 8, "widths": [8], "attention": [True], "head_width": 8, "norm_groups": 4},
        "optimizer": {"kind": "adamw", "learning_rate": 2e-3},
        "schedule": {"kind": "cosine", "warmup_steps": 2},
        "engine": {"zero_stage": stage, "precision": "fp32"},
        "evaluation": {"every_steps": 1000, "images": 0, "held_out_repeats": 1},
        "checkpoint": {"every_steps": 1000},
        **sections,
    }


def pictures(folder: Path) -> Path:
    """A data set of 24 drawn pictures, the same everywhere."""
    source = folder / "drawn"
    source.mkdir()
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((16, 16), Image.Resampling.NEAREST).save(buffer, "PNG")
        (source / f"{number:02d}.png").write_bytes(buffer.getvalue())
        (source / f"{number:02d}.txt").write_text(f"pattern number {number}")
    build(source, folder / "data", BuildConfig(held_out=0.2))
    return folder / "data"


def rank(number: int, world: int, port: int, config: Mapping[str, Any], run_dir: Path, ending: Ending | None) -> None:
    """One training process, which leaves what it tells in a file."""
    place = {"rank": number, "local_rank": number, "world": world, "address": "127.0.0.1", "port": port}
    spec = {"config": config, "run_dir": str(run_dir), **place}
    log = run_dir / f"rank-{number}.jsonl"
    output = os.open(log.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # as the fork server does
    with log.open("a", buffering=1) as file:

        def emit(event: Mapping[str, Any]) -> None:
            file.write(json.dumps(event) + "\n")
            if ending and event["event"] == "step" and event["step"] == ending.after:
                while ending.saved and checkpoint.newest(run_dir / "checkpoints")[0] is None:
                    time.sleep(0.01)
                os.kill(pids[ending.rank], ending.signal)

        pids = _everyone(log.parent, spec)
        code = worker.main("train", spec, emit)
    os._exit(code)


def _everyone(folder: Path, spec: Mapping[str, Any]) -> list[int]:
    """The processes of all ranks, once each has written its own down."""
    names = [folder / f"{spec['port']}-{number}.pid" for number in range(spec["world"])]
    partial = names[spec["rank"]].with_suffix(".partial")
    partial.write_text(str(os.getpid()))
    partial.rename(names[spec["rank"]])
    while not all(name.exists() for name in names):
        os.sched_yield()
    return [int(name.read_text()) for name in names]


def attempt(run_dir: Path, config: Mapping[str, Any], world: int, ending: Ending | None = None) -> list[int]:
    """Train as ``darkroom train`` does, from where the run stands; returns the exit codes by rank."""
    run_dir.mkdir(exist_ok=True)
    return together(world, rank, config, run_dir, ending)


def told(run_dir: Path) -> dict[str, Any]:
    """What a run has come to: the loss of every step, the ones done again, where it resumed, its weights' digest."""
    events = [json.loads(line) for line in (run_dir / "rank-0.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    losses = {event["step"]: event["metrics"]["loss"] for event in steps}
    found, refused = checkpoint.newest(run_dir / "checkpoints")
    digest = hashlib.sha256()
    if found is not None:
        for group in ("weights", "ema"):
            for name, tensor in sorted(found.load(group).items()):
                digest.update(f"{group} {name} {tuple(tensor.shape)} ".encode())
                digest.update(tensor.numpy().tobytes())
    return {
        "losses": [losses[step] for step in sorted(losses)],
        "steps": [event["step"] for event in steps],
        "resumed": [event["step"] for event in events if event["event"] == "resumed"],
        "refused": refused,
        "step": found.step if found else 0,
        "digest": digest.hexdigest(),
    }


def whole(out: Path, data: Path, world: int, stage: int) -> dict[str, Any]:
    """A run that nothing disturbs."""
    run_dir = out / f"world-{world}-zero-{stage}"
    codes = attempt(run_dir, recipe(data, stage), world)
    return {**told(run_dir), "codes": codes}


INTERRUPTED = {
    "left in order": (1, Ending(signal.SIGTERM), {"every_steps": 1000}),
    "killed, durable": (1, Ending(signal.SIGKILL, saved=True), {"every_steps": 3, "memory_every_steps": 0}),
    "killed, node memory": (1, Ending(signal.SIGKILL), {"every_steps": 1000}),
    "other rank killed, node memory": (3, Ending(signal.SIGKILL, rank=1), {"every_steps": 1000}),
}
"""The ZeRO stage, what ends the first attempt of two workers, and when the run's state is kept."""


def interrupted(out: Path, data: Path, name: str) -> dict[str, Any]:
    """A run whose first attempt is ended, and that the same command finishes."""
    stage, ending, keeping = INTERRUPTED[name]
    run_dir = out / name.replace(", ", "-").replace(" ", "-")
    config = recipe(data, stage, checkpoint=keeping)
    first = attempt(run_dir, config, 2, ending)
    second = attempt(run_dir, config, 2)
    return {**told(run_dir), "codes": [first, second], "stage": stage}


def main(words: list[str]) -> int:
    """All runs; what each came to goes to ``OUT/results.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="a folder for the runs")
    parser.add_argument("--write", action="store_true", help="make the golden curve anew, of one worker")
    parser.add_argument("--cases", nargs="*", default=None, metavar="WORLD-STAGE", help="only these whole runs")
    options = parser.parse_args(words)
    options.out.mkdir(parents=True, exist_ok=True)
    data = pictures(options.out)
    if options.write:
        losses = whole(options.out, data, 1, 1)["losses"]
        GOLDEN.write_text(json.dumps({"losses": losses}, indent=1) + "\n")
        return 0
    cases = options.cases if options.cases is not None else [f"{world}-{stage}" for world, stage in QUICK]
    results: dict[str, Any] = {"whole": {case: whole(options.out, data, *map(int, case.split("-"))) for case in cases}}
    if options.cases is None:
        results["interrupted"] = {name: interrupted(options.out, data, name) for name in INTERRUPTED}
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
