from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.stack import Stack
from training import checkpoint

TINY = Path(__file__).parent / "tiny.yaml"
Darkroom = Callable[..., "subprocess.CompletedProcess[str]"]
Train = Callable[..., dict[str, Any]]


def weights(outcome: dict[str, Any], group: str = "weights") -> dict[str, Any]:
    found, refused = checkpoint.newest(Path(outcome["run_dir"]) / "checkpoints")
    assert found is not None
    assert refused == []
    return dict(found.load(group))


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    pytest.fail(f"not within {seconds} s")


def training_process(run_dir: Path, rank: int) -> psutil.Process | None:
    """The process that writes a rank's log; the keeper above it does not."""
    log = run_dir / "logs" / f"rank-{rank}.log"
    for process in psutil.process_iter():
        try:
            target = Path(f"/proc/{process.pid}/fd/1").readlink()
        except OSError:
            continue
        if target == log:
            return process
    return None


@pytest.fixture(scope="module")
def undisturbed(stack: Stack, train: Train) -> dict[str, Any]:
    return train("--set", "name=undisturbed", "--set", "steps=12")


def test_a_run_tells_mlflow_everything(undisturbed: dict[str, Any], mlflow_uri: str, small_data: Path) -> None:
    from mlflow import MlflowClient

    assert undisturbed["step"] == 12
    assert "first step after" in undisturbed["log"]
    assert "process forked" in undisturbed["log"]
    client = MlflowClient(mlflow_uri)
    run = client.get_run(undisturbed["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["model.resolution"] == "8"
    assert run.data.params["conditioning.max_tokens"] == "12"
    assert len(run.data.tags["darkroom.lock_sha256"]) == 64
    assert run.data.tags["darkroom.data_hash"] == json.loads((small_data / "manifest.json").read_text())["hash"]
    saved = json.loads(next(Path(undisturbed["run_dir"]).glob("checkpoints/*12/checkpoint.json")).read_text())
    assert run.data.tags["data.use_digest"] == saved["about"]["use"]["digest"]
    assert run.inputs.dataset_inputs
    for name in ("loss", "learning_rate", "gradient_norm", "images_per_s"):
        steps = [point.step for point in client.get_metric_history(run.info.run_id, name)]
        assert steps == list(range(1, 13)), name
    held_out = [point.step for point in client.get_metric_history(run.info.run_id, "held_out_loss")]
    assert held_out == [3, 6, 9, 12]
    assert any(name.startswith("system/") for name in run.data.metrics)
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "images"} <= artifacts
    assert undisturbed["metrics"]["held_out_loss"] == pytest.approx(run.data.metrics["held_out_loss"])


def test_the_same_command_goes_on_where_it_was(train: Train, undisturbed: dict[str, Any]) -> None:
    half = train("--set", "name=halves", "--set", "steps=6")
    whole = train("--set", "name=halves", "--set", "steps=12")
    assert "resumed at step 6" in whole["log"]
    assert half["run_id"] == whole["run_id"]
    assert_equal_weights(whole, undisturbed)


def test_two_workers_and_zero_2_train_alike(train: Train, undisturbed: dict[str, Any]) -> None:
    two = train(
        *("--set", "name=two", "--set", "steps=12", "--set", "workers.count=2", "--set", "engine.zero_stage=2"),
        *("--set", "engine.precision=fp32"),
    )
    # the undisturbed run multiplied in bf16, hence the tolerance
    assert two["metrics"]["held_out_loss"] == pytest.approx(undisturbed["metrics"]["held_out_loss"], rel=2e-2)


def test_a_killed_training_process_is_replaced_and_nothing_changes(
    stack: Stack, home: Path, small_data: Path, undisturbed: dict[str, Any]
) -> None:
    command = start(home, small_data, "name=killed", "steps=12", "checkpoint.every_steps=1", "evaluation.every_steps=3")
    run_dir = home / "runs" / "killed"
    wait_for((run_dir / "checkpoints" / "step-00000004").exists)
    victim = wait_for(lambda: training_process(run_dir, 0))
    victim.kill()
    out, log = command.communicate(timeout=250)
    assert command.returncode == 0, log
    assert "resumed at step" in log
    assert json.loads(out)["step"] == 12
    assert_equal_weights({"run_dir": str(run_dir)}, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_and_sigterm_save_and_the_same_command_goes_on(
    stack: Stack, home: Path, small_data: Path, train: Train, number: signal.Signals
) -> None:
    name = f"interrupted-{number.name}"
    command = start(home, small_data, f"name={name}", "steps=100000", "checkpoint.every_steps=100000")
    run_dir = home / "runs" / name
    wait_for((run_dir / "samples").exists)
    command.send_signal(number)
    _, log = command.communicate(timeout=120)
    assert command.returncode == 130, log
    assert "Traceback" not in log
    saved = max((run_dir / "checkpoints").glob("step-*"))
    done = int(saved.name.removeprefix("step-"))
    again = train("--set", f"name={name}", "--set", f"steps={done + 2}")
    assert f"resumed at step {done}" in again["log"]


@pytest.mark.parametrize("when", [pytest.param("ray", marks=pytest.mark.slow), "logs/rank-0.log"])
def test_ctrl_c_while_a_run_starts_is_not_a_failure(stack: Stack, home: Path, small_data: Path, when: str) -> None:
    """Before there is a training process, and as soon as there is one."""
    name = f"early-{Path(when).stem}"
    command = start(home, small_data, f"name={name}", "steps=100000", "checkpoint.every_steps=100000")
    wait_for((home / "runs" / name / when).exists)
    command.send_signal(signal.SIGINT)
    _, log = command.communicate(timeout=120)
    assert command.returncode == 130, log
    assert "Traceback" not in log
    assert log.count("Interrupted: ") == 1
    assert "ended with" not in log
    assert training_process(home / "runs" / name, 0) is None


def test_another_recipe_under_the_same_name_is_refused(
    darkroom: Darkroom, undisturbed: dict[str, Any], small_data: Path
) -> None:
    done = darkroom(
        *("train", TINY, "--data", small_data, "--set", "name=undisturbed", "--set", "seed=5"), timeout_s=200
    )
    assert done.returncode == 1
    assert "seed has changed" in done.stderr
    assert "another name" in done.stderr
    assert "Traceback" not in done.stderr


def test_train_as_a_job_of_a_cluster(darkroom: Darkroom, stack: Stack, home: Path, small_data: Path) -> None:
    done = darkroom(
        *("train", TINY, "--data", small_data, "--set", "name=job", "--address", stack.dashboard_url), timeout_s=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "steps done: 6" in done.stdout + done.stderr
    assert (home / "runs" / "job" / "checkpoints" / "step-00000006").is_dir()


def start(home: Path, data: Path, *assignments: str) -> subprocess.Popen[str]:
    words = [word for assignment in assignments for word in ("--set", assignment)]
    return subprocess.Popen(
        [sys.executable, "-m", "cluster", "train", str(TINY), "--data", str(data), "--json", *words],
        env={**os.environ, "DARKROOM_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_equal_weights(one: dict[str, Any], other: dict[str, Any]) -> None:
    for group in ("weights", "ema", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
        left, right = weights(one, group), weights(other, group)
        assert left.keys() == right.keys()
        different = [name for name in left if not left[name].equal(right[name])]
        assert not different, f"{group}: {different[:3]}"
