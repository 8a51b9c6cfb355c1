"""``darkroom data encode`` as its user calls it: killed, interrupted, called again, and refused in words."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data.build import build
from training.data.config import BuildConfig

WAIT_S = 120.0
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures for several shards, with long and different captions: each shard takes the encoder a while."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(300):
        pixels = np.random.default_rng(number).integers(0, 256, (80, 80, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        (folder / f"{number:04d}.png").write_bytes(buffer.getvalue())
        (folder / f"{number:04d}.txt").write_text(f"number {number}, " + "very " * 100)
    return folder


@pytest.fixture
def data(tmp_path: Path, source: Path) -> Path:
    build(source, tmp_path / "data", BuildConfig(held_out=0.1, shard_mb=1))
    return tmp_path / "data"


def start(data: Path, *options: str) -> subprocess.Popen[str]:
    """The command, encoding with the packaged encoder."""
    words = [sys.executable, "-m", "cluster", "data", "encode", str(data), "--recipe", "base", *options]
    environment = {**os.environ, "COLUMNS": "160"}
    return subprocess.Popen(words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(data: Path, *options: str) -> subprocess.CompletedProcess[str]:
    process = start(data, *options)
    out, err = process.communicate(timeout=WAIT_S)
    return subprocess.CompletedProcess([], process.returncode, out, err)


def encoded(data: Path) -> dict[str, int]:
    """The whole files so far, and which they are."""
    return {path.name: path.stat().st_ino for path in data.glob("encoded/text-*/*.safetensors")}


def until_some(data: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a first file is whole, and another is begun."""
    deadline = time.monotonic() + WAIT_S
    while not encoded(data) or not list(data.glob("encoded/text-*/.*.partial")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_or_interrupted_command_goes_on_where_it_was(data: Path, way: signal.Signals) -> None:
    process = start(data)
    until_some(data, process)
    process.send_signal(way)
    _, err = process.communicate(timeout=WAIT_S)
    if way is signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in err
        assert "the same command goes on from there" in err
        assert not list(data.glob("encoded/text-*/.*.partial")), "nothing half-written is left"
    else:
        assert process.returncode == -signal.SIGKILL
    kept = encoded(data)
    again = run(data, "--json")
    assert again.returncode == 0, again.stderr
    told = json.loads(again.stdout)["encoded"][0]
    assert 0 < told["made"] == told["shards"] - len(kept)
    assert kept.items() <= encoded(data).items(), "what was whole is the same file still"
    assert len(encoded(data)) == told["shards"]
    if way is signal.SIGINT:
        assert "text: all shards were encoded already" in run(data, "--verify").stdout


def test_nothing_to_encode_and_what_is_wrong_is_said_in_words(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "cluster", "data", "encode", str(tmp_path)]

    def told(*options: str) -> str:
        done = subprocess.run([*words, *options], capture_output=True, text=True, timeout=WAIT_S, check=False)
        assert done.returncode == 2, done
        return done.stderr

    assert "options: --recipe RECIPE, --text ENCODER, --autoencoder DIR" in told()
    assert "--dtype is not valid." in told("--recipe", "base", "--dtype", "int8")
    assert "options: --resolution 512, --recipe RECIPE" in told("--autoencoder", str(tmp_path))
