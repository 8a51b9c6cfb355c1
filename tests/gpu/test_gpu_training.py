"""Training on a GPU through the fork server, which must not have touched CUDA itself."""

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training import agent, checkpoint

pytestmark = pytest.mark.gpu


def uses_cuda(pid: int) -> bool:
    """Whether a process has a CUDA context; NVML alone does not open this device."""
    return any(link.readlink().name == "nvidia-uvm" for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink())


@pytest.fixture(autouse=True)
def on_a_gpu(runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes get the GPUs that this one sees."""
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    assert agent.accelerator(os.environ) == "cuda", "the driver shows no GPU"
    runs.environment = {}


def test_the_process_computes_on_the_gpu_and_the_fork_server_does_not(
    runs: Any, running_process: Callable[[Path], int], peer_of: Callable[..., int]
) -> None:
    (rank,) = runs.start(runs.config(steps=100_000), "long")
    rank.until("step")
    assert uses_cuda(running_process(rank.log))
    assert not uses_cuda(peer_of(rank.process._connection))
    rank.process.stop()
    assert rank.end() == 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_tiny_recipe_trains_saves_and_goes_on(runs: Any, stage: int) -> None:
    config = runs.config(engine={"zero_stage": stage}, checkpoint={"every_steps": 3, "keep": 2})
    (rank,) = runs.start(config, "run")
    assert rank.end() == 0, rank.log.read_text()[-3000:]
    assert all(math.isfinite(event["metrics"]["loss"]) for event in rank.told("step"))
    assert len(rank.told("step")) == 6
    assert rank.told("evaluation")[-1]["metrics"]["held_out_loss"] > 0
    (again,) = runs.start({**config, "steps": 8}, "run")
    assert again.end() == 0, again.log.read_text()[-3000:]
    assert [event["step"] for event in again.told("step")] == [7, 8]
    found, refused = checkpoint.newest(runs.folder / "run" / "checkpoints")
    assert found is not None
    assert (found.step, refused) == (8, [])


def test_the_first_agents_gpus_are_not_those_of_all(runs: Any) -> None:
    """An agent that sees one GPU by its number, as Ray shows it, and one that sees all share the server."""
    for mask in ({"CUDA_VISIBLE_DEVICES": "0"}, {}):
        runs.environment = mask
        (rank,) = runs.start(runs.config(), f"mask-{len(mask)}")
        assert rank.end() == 0, rank.log.read_text()[-3000:]
        assert len(rank.told("step")) == 6


def test_cpu_and_gpu_train_alike(runs: Any, peer_of: Callable[..., int]) -> None:
    losses = []
    for environment, server in (({}, runs.server), ({"DS_ACCELERATOR": "cpu"}, runs.server.with_name("cpu.sock"))):
        runs.environment, runs.server = environment, server
        (rank,) = runs.start(runs.config(engine={"precision": "fp32"}), server.stem)
        assert rank.end() == 0, rank.log.read_text()[-3000:]
        losses.append([event["metrics"]["loss"] for event in rank.told("step")])
    os.kill(peer_of(rank.process._connection), signal.SIGTERM)  # the server for the CPU is this test's own
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
