"""Training processes killed without warning: the run goes on in place, exactly, and gives up when that is in vain."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from cluster.stack import Stack
from tests.faults.killed_run import Killer, train, training_process
from training.data.audit import audit
from training.errors import TrainingError
from training.ray_agent import ENTERED

PAIR = ("workers.count=2", "workers.cpus=0.45", "checkpoint.every_steps=20", "evaluation.every_steps=20")


def files(run_dir: Path) -> dict[str, Any]:
    """All tensors of the newest checkpoint, by file and name."""
    newest = max((run_dir / "checkpoints").glob("step-*"))
    found = {}
    for path in sorted(newest.rglob("*.safetensors")):
        found.update({f"{path.relative_to(newest)}:{name}": value for name, value in load_file(path).items()})
    assert found
    return found


def killed_and_equal(tmp_path: Path, data: Path, kills: int, steps: int) -> None:
    """Kill a run so often, and compare it with one that was left alone."""
    settings = (*PAIR, f"steps={steps}")
    train(tmp_path / "calm", data, lambda _: None, *settings)
    killer = Killer(tmp_path / "killed", kills)
    outcome = train(tmp_path / "killed", data, killer, *settings)
    assert outcome.step == steps
    assert len(killer.recovery_s) == kills
    assert sum("was killed (SIGKILL)" in line for line in killer.told) == kills, killer.told
    report = audit(tmp_path / "killed", str(data))
    assert (report.lost, report.duplicated, report.findings) == (0, 0, [])
    assert len(killer.redone) == kills
    assert max(killer.redone) <= 1, killer.redone
    assert report.redone <= kills
    calm, killed = files(tmp_path / "calm"), files(tmp_path / "killed")
    assert calm.keys() == killed.keys()
    assert [name for name in calm if not calm[name].equal(killed[name])] == []


@pytest.mark.timeout(280)
def test_five_kills_change_nothing(ray_session: Stack, tmp_path: Path, small_data: Path) -> None:
    killed_and_equal(tmp_path, small_data, kills=5, steps=120)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_kills_change_nothing(ray_session: Stack, tmp_path: Path, small_data: Path) -> None:
    killed_and_equal(tmp_path, small_data, kills=100, steps=1500)


@pytest.mark.timeout(200)
def test_a_process_that_dies_at_once_again_and_again_ends_the_run(
    ray_session: Stack, tmp_path: Path, small_data: Path
) -> None:
    run_dir = tmp_path / "loop"

    ended = threading.Event()

    def kill_as_soon_as_it_is_there() -> None:
        while not ended.wait(0.02):
            victim = training_process(run_dir, 0)
            if victim is not None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()

    settings = (*PAIR, "steps=100000", "workers.max_failures=2")
    killer = threading.Thread(target=kill_as_soon_as_it_is_there)
    killer.start()
    try:
        with pytest.raises(TrainingError, match=r"rank 0 was killed \(SIGKILL\).*3 times in a row") as caught:
            train(run_dir, small_data, lambda _: None, *settings)
    finally:
        ended.set()
        killer.join()
    assert "workers.max_failures is 2" in str(caught.value)
    assert str(run_dir / "logs" / "rank-0.log") in str(caught.value)
    assert not [rank for rank in range(2) if training_process(run_dir, rank)]


@pytest.mark.timeout(250)
def test_an_agent_that_is_killed_is_replaced_by_ray(ray_session: Stack, tmp_path: Path, small_data: Path) -> None:
    run_dir = tmp_path / "agent"
    agents: list[int] = []
    killed: list[int] = []
    ends: list[dict[str, Any]] = []

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "mark" and event["name"] == ENTERED:
            agents.append(event["pid"])
        elif event["event"] == "done":
            ends.append(event)
        elif event["event"] == "step" and event["step"] >= 5 and not killed:
            killed.append(agents[0])
            os.kill(agents[0], signal.SIGKILL)

    outcome = train(run_dir, small_data, on_event, *PAIR, "steps=300")
    assert len(set(agents)) == 2
    assert outcome.step == 300
    assert not outcome.stopped
    assert len(ends) == 1, "a process that left because its agent was lost is not the end of the run"
    report = audit(run_dir, str(small_data))
    assert (report.lost, report.duplicated, report.findings) == (0, 0, [])
