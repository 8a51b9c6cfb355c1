"""Runs whose number of workers changes on the way: what they compute and what they consume stays."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.core.generated import autoscaler_pb2

from cluster.stack import Stack
from tests.faults.killed_run import train
from training import agent, checkpoint, ray_preemption
from training.data.audit import audit
from training.ray_agent import ENTERED

ELASTIC = ("workers.min=1", "workers.max=2", "workers.resize_every_s=2")
COMMON = ("workers.cpus=0.45", "engine.precision=fp32", "checkpoint.every_steps=10", "evaluation.every_steps=100000")


class Follower:
    """Notes what a run tells of its workers and steps."""

    def __init__(self) -> None:
        self.worlds: list[int] = []
        self.resumed: list[int] = []
        self.steps: list[int] = []
        self.told: list[str] = []

    def __call__(self, event: dict[str, Any]) -> None:
        """Take an event."""
        if event["event"] == "mark" and event["name"] == ENTERED:
            self.worlds.append(event["world"])
        elif event["event"] == "resumed":
            self.resumed.append(event["step"])
        elif event["event"] == "step":
            self.steps.append(event["step"])
        elif event["event"] == "warning":
            self.told.append(event["message"])


def assert_alike(one: Path, other: Path, data: Path, steps: int) -> None:
    """Two runs have consumed the same samples, once each, and have the same weights but for the order of sums."""
    reports = [audit(run_dir, str(data)) for run_dir in (one, other)]
    for report in reports:
        assert (report.steps, report.lost, report.duplicated, report.redone, report.findings) == (steps, 0, 0, 0, [])
    assert reports[0].digest == reports[1].digest
    newest = [checkpoint.newest(run_dir / "checkpoints")[0] for run_dir in (one, other)]
    left, right = (found.load("weights") for found in newest if found is not None)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.allclose(tensor, right[name], atol=2e-3), name


@pytest.mark.timeout(280)
def test_a_run_goes_on_with_two_workers_then_one_then_as_many_as_fit(
    ray_session: Stack, tmp_path: Path, small_data: Path
) -> None:
    follower, run_dir = Follower(), tmp_path / "elastic"
    for steps, workers in ((12, ("workers.count=2",)), (24, ("workers.count=1",)), (36, ELASTIC)):
        outcome = train(run_dir, small_data, follower, *COMMON, *workers, f"steps={steps}")
        assert (outcome.step, outcome.stopped) == (steps, False)
    assert follower.worlds == [2, 1, 2]
    assert follower.resumed == [12, 24]
    assert follower.steps == list(range(1, 37)), "nothing is done twice"
    train(tmp_path / "calm", small_data, lambda _: None, *COMMON, "steps=36")
    assert_alike(run_dir, tmp_path / "calm", small_data, 36)


class Nodes:
    """A Ray of two nodes of one CPU each, the second of which comes and goes; this process is its driver."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        ray.init(address=self._cluster.address, log_to_driver=False)
        self.add()

    def add(self) -> None:
        """The second node comes."""
        self._second = self._cluster.add_node(num_cpus=1)

    def remove(self) -> None:
        """The second node is killed."""
        self._cluster.remove_node(self._second, allow_graceful=False)

    def notify(self, seconds: float) -> None:
        """The second node is to be taken away in so many seconds."""
        client = ray._raylet.GcsClient(address=self._cluster.address)
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = client.drain_node(self._second.node_id, reason, "test", int((time.time() + seconds) * 1000))
        assert accepted, why

    def close(self) -> None:
        """End it, and the fork server that its agents have started."""
        server = agent.socket_path(self._cluster.address.rsplit(":", 1)[-1], {"DS_ACCELERATOR": "cpu"})
        ray.shutdown()
        self._cluster.shutdown()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, contextlib.suppress(OSError):
            connection.connect(str(server))
            told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            os.kill(struct.unpack("3i", told)[0], signal.SIGTERM)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """A cluster of this test's own."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    made = Nodes()
    yield made
    made.close()


LONG = (*ELASTIC, *COMMON, "workers.cpus=0.9", "model.resolution=32", "steps=100000")


def calm_and_alike(run_dir: Path, data: Path, steps: int) -> None:
    """Compare a run with an undisturbed one of one worker."""
    calm = run_dir.parent / "calm"
    train(calm, data, lambda _: None, *LONG, "workers.max=1", f"steps={steps}")
    assert_alike(run_dir, calm, data, steps)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_follows_the_nodes_that_go_and_come(nodes: Nodes, tmp_path: Path, small_data: Path) -> None:
    follower, run_dir = Follower(), tmp_path / "elastic"

    def on_event(event: dict[str, Any]) -> None:
        follower(event)
        if event["event"] != "step":
            return
        since = event["step"] - (follower.resumed[-1] if follower.resumed else 0)
        if follower.worlds == [2] and since == 15:
            nodes.remove()
        elif follower.worlds == [2, 1] and since == 15:
            nodes.add()
        elif follower.worlds == [2, 1, 2] and since == 15:
            signal.raise_signal(signal.SIGINT)

    outcome = train(run_dir, small_data, on_event, *LONG)
    assert outcome.stopped
    assert follower.worlds == [2, 1, 2]
    assert len(follower.resumed) == 2
    assert max(follower.steps) == outcome.step
    calm_and_alike(run_dir, small_data, outcome.step)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_notice_that_a_node_goes_saves_a_checkpoint_in_time(nodes: Nodes, tmp_path: Path, small_data: Path) -> None:
    follower, run_dir = Follower(), tmp_path / "notified"

    def on_event(event: dict[str, Any]) -> None:
        follower(event)
        if event["event"] == "step" and event["step"] == 15 and not follower.resumed:
            nodes.notify(ray_preemption.LEAVES_BEFORE_S + 3)
        elif event["event"] == "done" and len(follower.worlds) == 1:
            nodes.remove()
        elif event["event"] == "step" and follower.resumed and event["step"] == follower.resumed[0] + 15:
            signal.raise_signal(signal.SIGINT)

    outcome = train(run_dir, small_data, on_event, *LONG, "checkpoint.every_steps=100000")
    assert ray_preemption.TOLD in follower.told
    assert follower.worlds == [2, 1]
    assert follower.steps == list(range(1, outcome.step + 1)), "nothing is done twice"
    calm_and_alike(run_dir, small_data, outcome.step)
