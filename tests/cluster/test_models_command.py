"""``darkroom models`` as a user calls it, against a real MLflow server."""

import json
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from cluster.stack import Stack
from training.registry_store import BUNDLE_TAG, DATA_TAG, METRICS_TAG, RUN_TAG
from training.tracking import connect


@pytest.fixture(scope="module")
def name(mlflow_uri: str) -> str:
    """A registered model with two versions; the command reads names and figures only, so there are no files."""
    client = connect(mlflow_uri)
    name = f"cli-{uuid.uuid4().hex[:8]}"
    run = client.create_run(client.create_experiment(name))
    client.create_registered_model(name)
    for number in (1, 2):
        metrics = json.dumps({"kid_held_out": 0.125 * number, "held_out_loss": 0.5})
        tags = {RUN_TAG: run.info.run_id, DATA_TAG: "ab" * 32, METRICS_TAG: metrics, BUNDLE_TAG: "cd" * 32}
        client.create_model_version(
            name, f"{run.info.artifact_uri}/b", run.info.run_id, tags=tags, await_creation_for=0
        )
    return name


def _darkroom(uri: str | None, *arguments: str, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    front = ["--home", str(home)] if home else []
    tail = ["--tracking-uri", uri] if uri else []
    command = [sys.executable, "-m", "cluster", *front, "models", *arguments, *tail]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_list_promote_roll_back_and_show(mlflow_uri: str, name: str) -> None:
    listed = _darkroom(mlflow_uri, "list", name)
    assert listed.returncode == 0, listed.stderr
    assert name in listed.stdout
    assert "0.25" in listed.stdout
    for version in ("1", "2"):
        promoted = _darkroom(mlflow_uri, "promote", name, version)
        assert f"{name}@champion is now version {version}." in promoted.stdout, promoted.stderr
    restored = json.loads(_darkroom(mlflow_uri, "rollback", name, "--json").stdout)
    assert (restored["version"], restored["aliases"]) == (1, ["champion"])
    shown = json.loads(_darkroom(mlflow_uri, "show", f"{name}@champion", "--json").stdout)
    assert shown == restored
    assert shown["metrics"] == {"held_out_loss": 0.5, "kid_held_out": 0.125}


def test_errors_are_one_screen(mlflow_uri: str, name: str, tmp_path: Path) -> None:
    unknown = _darkroom(mlflow_uri, "promote", name, "7")
    assert unknown.returncode == 1
    assert f"options: {name}/2, {name}/1" in unknown.stderr
    nowhere = _darkroom("http://127.0.0.1:9", "list")
    assert (nowhere.returncode, nowhere.stdout) == (1, "")
    assert "cannot be reached" in nowhere.stderr
    assert _darkroom(mlflow_uri, "promote", name, "none").returncode == 2
    for failed in (unknown, nowhere):
        assert "Traceback" not in failed.stderr


def test_without_a_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    failed = _darkroom(None, "list", home=tmp_path)
    assert failed.returncode == 1
    assert "darkroom up" in failed.stderr
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    failed = _darkroom(None, "list", home=tmp_path)
    assert failed.returncode == 1
    assert "value:   'http://127.0.0.1:9'" in failed.stderr


def test_the_local_stack_comes_before_the_variable(stack: Stack, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and serving use it too: one command never asks another server than the next."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    listed = _darkroom(None, "list", name, home=stack.home)
    assert listed.returncode == 0, listed.stderr
    assert name in listed.stdout
