"""Pictures per second of ``data build`` next to bare decoding and encoding, and what a second core brings.

    python -m tests.benchmarks.data_build [--rounds 3] [--json FILE] [--pictures 1500] [--side 512]

The floor decodes each picture once, strictly, and encodes it once, on one core and without a byte of Python around it
that could be left out. A build does that for the store ``jpeg`` and, for the store ``original``, decodes only; around
it, it reads, hashes, judges by all rules that are on by default, writes shards, index, ledger and manifest, and waits
for the disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from tests.benchmarks.report import Row, publish, row
from training.data.build import build
from training.data.config import BuildConfig
from training.data.executor import LocalExecutor
from training.data.normalise import JpegStore
from training.data.progress import Step

QUALITY = 92


def pictures(folder: Path, count: int, side: int) -> list[Path]:
    """Photographs' stand-ins: smooth shapes with some grain, cut from one canvas, about 90 kB at 512 px."""
    random = np.random.default_rng(0)
    corners = Image.fromarray(random.integers(0, 256, (48, 48, 3), np.uint8))
    edge = 6 * side
    shapes = np.asarray(corners.resize((edge, edge), Image.Resampling.BICUBIC))
    canvas = np.clip(shapes + random.normal(0, 6, (edge, edge, 1)), 0, 255).astype(np.uint8)
    paths = []
    for number in range(count):
        top, left = random.integers(0, edge - side, 2)
        pixels = np.ascontiguousarray(canvas[top : top + side, left : left + side, random.permutation(3)])
        paths.append(folder / f"{number:06d}.jpg")
        paths[-1].write_bytes(simplejpeg.encode_jpeg(pixels, quality=QUALITY, colorsubsampling="420"))
        paths[-1].with_suffix(".txt").write_text(f"shapes number {number}, in all colours")
    return paths


def decoded(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)


def cpu_s() -> float:
    """CPU seconds of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def floor(paths: list[Path], *, encode: bool) -> float:
    """Pictures per CPU second."""
    datas = [path.read_bytes() for path in paths]
    began = cpu_s()
    for data in datas:
        pixels = decoded(data)
        if encode:
            simplejpeg.encode_jpeg(pixels, quality=QUALITY, colorspace="RGB", colorsubsampling="444")
    return len(datas) / (cpu_s() - began)


def stages(source: Path, config: BuildConfig, workers: int) -> dict[str, float]:
    """Seconds of a whole build and of its stages, and its CPU seconds."""
    out = Path(tempfile.mkdtemp(dir=source.parent)) / "out"
    began = {"all": time.perf_counter()}
    used = cpu_s()

    def note(step: Step) -> None:
        began.setdefault(step.stage, time.perf_counter())

    build(source, out, config, note, executor=LocalExecutor(workers))
    end = time.perf_counter()
    shutil.rmtree(out.parent)
    return {
        "all": end - began["all"],
        "judge": began["decide"] - began["judge"],
        "rest": end - began["decide"],
        "cpu": cpu_s() - used,
    }


def measure(count: int, side: int, rounds: int) -> list[Row]:
    """The rows; the sides take turns, so that what else the machine does meets all of them."""
    seen: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        paths = pictures(source, count, side)
        original, jpeg = BuildConfig(), BuildConfig(store=JpegStore(quality=QUALITY))
        stages(source, original, 1)  # reads the files and loads the libraries, once
        for _ in range(rounds):
            one, two, anew = stages(source, original, 1), stages(source, original, 2), stages(source, jpeg, 1)
            values = {
                "decode": floor(paths, encode=False),
                "decode + encode": floor(paths, encode=True),
                "original": count / one["cpu"],
                "jpeg": count / anew["cpu"],
                "rest": count / one["rest"],
                "one": one["all"],
                "two": two["all"],
                "cpu one": one["cpu"],
                "cpu two": two["cpu"],
            }
            for name, value in values.items():
                seen.setdefault(name, []).append(value)
            told = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
            print(f"  load {os.getloadavg()[0]:.1f}: {told}", flush=True)
    return rows(seen)


def rows(seen: dict[str, list[float]]) -> list[Row]:
    """The figures, each with its goal."""
    middle = {name: statistics.median(values) for name, values in seen.items()}
    bare, per_core = seen["decode + encode"], "pictures/CPU s"

    def against_bare(title: str, name: str, share: float) -> Row:
        met = middle[name] >= share * middle["decode + encode"]
        return row(title, per_core, seen[name], bare, "bare decode + encode", f">= {share}", met)

    more, halved = middle["cpu two"] / middle["cpu one"], middle["two"] / middle["one"]
    return [
        against_bare("build, pictures kept as they are", "original", 0.7),
        against_bare("build, pictures stored anew as JPEG", "jpeg", 0.5),
        row("of it, all after judging", "pictures/s", seen["rest"], [], "", ">= 1000", middle["rest"] >= 1000),
        row("two cores", "s", seen["two"], seen["one"], "one core", "<= 0.6 on an idle machine", halved <= 0.6),
        row("two cores", "CPU s", seen["cpu two"], seen["cpu one"], "one core", "<= 1.3", more <= 1.3),
    ]


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side is measured, alternating")
    parser.add_argument("--pictures", type=int, default=5000, help="pictures of a build")
    parser.add_argument("--side", type=int, default=512, help="their side in pixels")
    asked = parser.parse_args()
    publish(measure(asked.pictures, asked.side, asked.rounds), asked.json)


if __name__ == "__main__":
    main()
