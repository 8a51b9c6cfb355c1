from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from cluster.stack import Stack

TINY = Path(__file__).parent / "tiny.yaml"
Darkroom = Callable[..., "subprocess.CompletedProcess[str]"]

ARGUMENTS = (
    *("--trials", "3", "--steps", "8", "--grace-steps", "2", "--set", "name=swept", "--json"),
    *("--search", "optimizer.learning_rate=choice(1e-6, 1e-2, 1e-3)"),
)


def test_a_sweep_knows_its_best_trial_and_is_not_run_twice(
    darkroom: Darkroom, stack: Stack, small_data: Path, mlflow_uri: str, ray_session: Stack
) -> None:
    from mlflow import MlflowClient

    done = darkroom("sweep", TINY, "--data", small_data, *ARGUMENTS, timeout_s=290)
    assert done.returncode == 0, done.stderr
    trials: list[dict[str, Any]] = json.loads(done.stdout)
    assert sorted(trial["values"]["optimizer.learning_rate"] for trial in trials) == [1e-6, 1e-3, 1e-2]
    assert all(trial["status"] in {"finished", "stopped"} for trial in trials), (trials, done.stderr)
    assert trials[0]["status"] == "finished"
    assert trials[0]["values"]["optimizer.learning_rate"] != 1e-6, "it cannot learn"
    reached = [(-trial["step"], trial["loss"]) for trial in trials]
    assert reached == sorted(reached)

    # a stopped trial's placement group goes with it; on two cores a leaked one is the end of the next run
    deadline = time.monotonic() + 30
    while ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0.0) >= 0.5:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.1)

    client = MlflowClient(mlflow_uri)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.`mlflow.runName` LIKE 'swept-sweep-%'")
    assert len(runs) == 1
    nested = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{runs[0].info.run_id}'")
    assert sorted(run.data.tags["darkroom.trial"] for run in nested) == ["0", "1", "2"]
    assert len({run.data.tags["ray.trial_id"] for run in nested}) == 3

    again = darkroom("sweep", TINY, "--data", small_data, *ARGUMENTS, timeout_s=60)
    assert json.loads(again.stdout) == trials
    assert "trial 0: step" not in again.stderr


def test_a_bad_trial_is_named_and_the_others_go_on(darkroom: Darkroom, stack: Stack, small_data: Path) -> None:
    done = darkroom(
        *("sweep", TINY, "--data", small_data, "--trials", "2", "--steps", "3", "--grace-steps", "1", "--json"),
        *("--set", "name=half", "--search", "optimizer.learning_rate=choice(1e30, 1e-3)"),
        timeout_s=290,
    )
    assert done.returncode == 0, done.stderr
    good, bad = json.loads(done.stdout)
    assert good["values"] == {"optimizer.learning_rate": 1e-3}
    assert (good["status"], good["step"], good["reason"]) == ("finished", 3, "")
    assert bad["status"] == "failed"
    assert "diverged" in bad["reason"]
    assert "Traceback" not in done.stderr
