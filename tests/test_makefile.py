"""The Makefile's environment, with a Python that only writes down what it is asked: no network, no minutes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STUB = """#!/bin/bash
# a Python that makes environments of copies of itself and installs nothing
echo "$0 $*" >> "$CALLS"
case "$*" in
    "-m venv --clear "*) rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    *"pip install"*torch==*) touch "$CALLS.torch" ;;
    *"pip install"*) [ ! -e "$CALLS.no_network" ] ;;
    "-c import torch") [ ! -e "$CALLS.cuda" ] || [ -e "$CALLS.torch" ] ;;
    "-m cluster down") [ ! -e "$CALLS.broken" ] ;;
esac
"""


class Clone:
    """A fresh clone, as far as the Makefile looks at it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder.parent / "calls"
        folder.mkdir()
        for name in ("Makefile", "requirements.lock", "pyproject.toml"):
            shutil.copy(ROOT / name, folder / name)
        for package in ("cluster", "serving", "training", "tests"):
            (folder / package / "__pycache__").mkdir(parents=True)
        self.python = folder.parent / "python3.11"
        self.python.write_text(STUB)
        self.python.chmod(0o755)

    def make(self, target: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        """Run a real target; what came of it, and what Python was asked meanwhile."""
        self.calls.unlink(missing_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        run = subprocess.run(
            ["make", target, f"PYTHON={self.python}"],
            cwd=self.folder,
            env=environment | {"CALLS": str(self.calls)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return run, self.calls.read_text().splitlines() if self.calls.exists() else []

    def happens(self, what: str) -> None:
        """From now on the stub behaves otherwise."""
        self.calls.with_name(f"calls.{what}").touch()


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path / "darkroom")


def installs(calls: list[str]) -> list[str]:
    return [call.partition(" -m pip install ")[2] for call in calls if "pip install" in call]


def test_an_environment_is_made_once(clone: Clone) -> None:
    run, calls = clone.make("test")
    assert run.returncode == 0, run.stderr
    assert [words.split(" --disable-pip-version-check ")[1] for words in installs(calls)] == [
        "--no-deps -r requirements.lock",
        "--no-deps --no-build-isolation --editable .",
    ]
    assert calls[-1].endswith(".venv/bin/python -m pytest")
    run, calls = clone.make("test")
    assert (run.returncode, installs(calls)) == (0, [])
    assert calls[-1].endswith(".venv/bin/python -m pytest")


def test_a_half_made_environment_is_made_from_nothing(clone: Clone) -> None:
    clone.happens("no_network")
    run, _ = clone.make("test")
    assert run.returncode != 0
    leftover = clone.folder / ".venv" / "leftover"
    leftover.touch()
    clone.calls.with_name("calls.no_network").unlink()
    run, calls = clone.make("test")
    assert run.returncode == 0, run.stderr
    assert len(installs(calls)) == 2
    assert not leftover.exists()


def test_a_python_that_does_not_run_is_replaced(clone: Clone) -> None:
    clone.make("venv")
    (clone.folder / ".venv" / "bin" / "python").unlink()
    run, calls = clone.make("test")
    assert run.returncode == 0, run.stderr
    assert len(installs(calls)) == 2


@pytest.mark.parametrize("name", ["requirements.lock", "pyproject.toml"])
def test_a_changed_lock_makes_the_environment_anew(clone: Clone, name: str) -> None:
    clone.make("venv")
    with (clone.folder / name).open("a") as file:
        file.write("# changed\n")
    _, calls = clone.make("venv")
    assert len(installs(calls)) == 2


def test_a_moved_clone_is_made_anew(clone: Clone) -> None:
    clone.make("venv")
    clone.folder = clone.folder.rename(clone.folder.with_name("elsewhere"))
    _, calls = clone.make("venv")
    assert len(installs(calls)) == 2
    _, calls = clone.make("venv")
    assert installs(calls) == []


def test_a_cuda_build_of_torch_gets_its_packages(clone: Clone) -> None:
    clone.happens("cuda")
    run, calls = clone.make("venv")
    assert run.returncode == 0, run.stderr
    _, second, _ = installs(calls)
    assert second.endswith("-c requirements.lock torch==2.13.0")
    assert "CUDA" in run.stdout
    assert "GB" in run.stdout


def test_clean_works_where_darkroom_does_not(clone: Clone) -> None:
    clone.make("venv")
    (clone.folder / ".darkroom").mkdir()
    (clone.folder / ".darkroom" / "stack.json").touch()
    run, calls = clone.make("clean")
    assert run.returncode == 0, run.stderr
    assert calls[0].endswith("-m cluster down")
    assert not (clone.folder / ".venv").exists()
    assert not list(clone.folder.rglob("__pycache__"))
    assert (clone.folder / ".darkroom" / "stack.json").exists()
    clone.make("venv")
    clone.happens("broken")
    run, _ = clone.make("clean")
    assert run.returncode == 0, run.stderr
    assert "nothing was stopped" in run.stderr
    assert not (clone.folder / ".venv").exists()
    run, _ = clone.make("clean")  # and with no environment at all
    assert run.returncode == 0, run.stderr
