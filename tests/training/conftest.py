"""A tiny data set, one fork server for the session, and tiny runs in real processes."""

from __future__ import annotations

import contextlib
import io
import os
import queue
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.training.forked import Warm
from training import agent
from training.data.build import build
from training.data.config import BuildConfig

Event = dict[str, Any]
WAIT_S = 90.0
"""No event of a tiny run takes longer, on a busy machine."""


class Launched:
    """A training process and what it has told."""

    def __init__(self, process: agent.TrainingProcess, log: Path) -> None:
        self.process, self.log = process, log
        self.events: list[Event] = []
        self._arriving: queue.SimpleQueue[Event] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the test closed the connection
            for event in self.process.events():
                self._arriving.put(event)

    def until(self, kind: str) -> Event:
        """The next event of a kind."""
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                event = self._arriving.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                seen = [told["event"] for told in self.events]
                pytest.fail(f"no {kind!r} after {seen}\n{self.log.read_text()[-3000:] if self.log.exists() else ''}")
            self.events.append(event)
            if event["event"] == kind:
                return event
            assert event["event"] != "exit", f"{event} before {kind!r}: {self.log.read_text()[-3000:]}"

    def end(self) -> int:
        """Wait for its end; returns the exit code."""
        return int(self.until("exit")["code"])

    def told(self, kind: str) -> list[Event]:
        """The events of a kind so far."""
        return [event for event in self.events if event["event"] == kind]


@dataclass
class Runs:
    """Launches ranks of tiny runs, and ends at the test's end what it launched."""

    server: Path
    data: Path
    folder: Path
    launched: list[Launched] = field(default_factory=list)
    environment: Mapping[str, str] = field(default_factory=lambda: {"DS_ACCELERATOR": "cpu"})
    """Added to this process's; two ranks cannot share a GPU."""

    def config(self, **sections: Any) -> dict[str, Any]:
        """A tiny recipe; ``sections`` replace or extend its own."""
        recipe: dict[str, Any] = {
            "name": "tiny",
            "steps": 6,
            "global_batch": 8,
            "data": {"path": str(self.data)},
            "model": {
                "resolution": 8,
                "widths": [8, 16],
                "attention": [False, True],
                "head_width": 8,
                "norm_groups": 4,
            },
            "schedule": {"kind": "constant", "warmup_steps": 2},
            "evaluation": {"every_steps": 1000, "images": 2, "sample_steps": 2, "held_out_repeats": 1},
            "checkpoint": {"every_steps": 1000},
        }
        for key, value in sections.items():
            recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, Mapping) else value
        return recipe

    def specs(self, config: Mapping[str, Any], run: str, world: int = 1) -> list[dict[str, Any]]:
        """What every rank of a run is told; the first is rank 0."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        run_dir = self.folder / run
        run_dir.mkdir(exist_ok=True)
        shared = {"config": config, "run_dir": str(run_dir), "world": world, "address": "127.0.0.1", "port": port}
        return [{**shared, "rank": rank, "local_rank": rank} for rank in range(world)]

    def start(self, config: Mapping[str, Any], run: str, world: int = 1) -> list[Launched]:
        """Launch every rank of a run; the first is rank 0."""
        return [
            self.launch("train", spec, self.folder / run / f"rank-{spec['rank']}.log")
            for spec in self.specs(config, run, world)
        ]

    def launch(self, task: Any, spec: Mapping[str, Any], log: Path) -> Launched:
        """Launch one process."""
        return self.follow(agent.launch(self.server, task, spec, log, {**os.environ, **self.environment}), log)

    def follow(self, process: agent.TrainingProcess, log: Path) -> Launched:
        """Take note of what a process tells, and end it with the test."""
        self.launched.append(Launched(process, log))
        return self.launched[-1]

    def close(self) -> None:
        """End what still runs."""
        for launched in self.launched:
            pid = process_of(launched.log)
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            launched.process.close()


def process_of(log: Path) -> int | None:
    """The process whose output goes to ``log``."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "fd" / "1").readlink() == log and "Z" not in (folder / "stat").read_text().rsplit(")")[-1]:
                return int(folder.name)
    return None


def peer(connection: socket.socket) -> int:
    """The process that listens at the other end of a unix socket."""
    return int(struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


def eventually(condition: Callable[[], object], what: str, within_s: float = WAIT_S) -> None:
    """Look until it is so."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:.0f} s: {what}"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Runs the programs that stand beside the tests, forked from one process that has imported all they need."""
    started = Warm()
    yield started
    started.end()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set of 24 small pictures."""
    source, out = tmp_path_factory.mktemp("drawn"), tmp_path_factory.mktemp("tiny") / "data"
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        (source / f"{number:02d}.png").write_bytes(buffer.getvalue())
        (source / f"{number:02d}.txt").write_text(f"pattern number {number}")
    manifest = build(source, out, BuildConfig(held_out=0.2))
    assert manifest.splits["held_out"].count
    return out


@pytest.fixture(scope="session")
def fork_server() -> Iterator[Path]:
    """The socket of a fork server of the tests' own; the first launch starts it."""
    folder = Path(tempfile.mkdtemp(prefix="dr-fork-", dir="/tmp"))
    path = folder / "s.sock"
    yield path
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, contextlib.suppress(OSError):
        connection.connect(str(path))
        os.kill(peer(connection), signal.SIGTERM)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def runs(fork_server: Path, tiny_data: Path, tmp_path: Path) -> Iterator[Runs]:
    """Tiny runs below the test's folder."""
    started = Runs(fork_server, tiny_data, tmp_path)
    yield started
    started.close()


@pytest.fixture(scope="session")
def running_process() -> Callable[[Path], int | None]:
    """``running_process(log)``: the training process whose log that is, or None."""
    return process_of


@pytest.fixture(scope="session")
def look() -> Callable[..., None]:
    """``look(condition, "what")`` until it is so."""
    return eventually


@pytest.fixture(scope="session")
def peer_of() -> Callable[[socket.socket], int]:
    """``peer_of(connection)``: the process that listens at its other end."""
    return peer


@pytest.fixture(scope="session")
def autoencoder_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny autoencoder with random weights, in diffusers' layout: two pixels of a side become one."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.7,
        shift_factor=0.1,
    )
    folder = tmp_path_factory.mktemp("autoencoder") / "vae"
    model.save_pretrained(folder, safe_serialization=True)
    return folder
