"""The engine's self-tests on a GPU: every ZeRO stage, precision, average and resume, with NCCL and a world of one."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from training import agent
from training.self_tests import CHECKS, PREPARED

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_a_gpu(runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes get the GPUs that this one sees."""
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    assert agent.accelerator(os.environ) == "cuda", "the driver shows no GPU"
    runs.environment = {}


@pytest.mark.parametrize("check", CHECKS)
def test_a_self_test_passes(runs: Any, tmp_path: Path, check: str) -> None:
    folder = tmp_path / check
    folder.mkdir()
    for phase in ("prepare", "check") if check in PREPARED else ("check",):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            place = {"rank": 0, "local_rank": 0, "world": 1, "address": "127.0.0.1", "port": probe.getsockname()[1]}
        spec = {"check": check, "phase": phase, "folder": str(folder), **place}
        process = runs.launch("self_test", spec, tmp_path / f"{phase}.log")
        assert process.end() == (-9 if phase == "prepare" else 0), process.log.read_text()[-3000:]
    (finding,) = process.told("finding")
    assert finding["ok"], finding
