from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.cli import COMMANDS

Darkroom = Callable[..., "subprocess.CompletedProcess[str]"]

HEAVY = {"torch", "ray", "mlflow", "diffusers", "transformers", "deepspeed", "numpy", "pandas"}


def test_help_names_every_command_and_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys, runpy\nsys.argv = ['darkroom', '--help']\n"
        "try:\n    runpy.run_module('cluster', run_name='__main__')\n"
        "except SystemExit as leaving:\n    assert not leaving.code\n"
        "print('MODULES', *sorted(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    shown, _, modules = run.stdout.partition("MODULES")
    assert all(name in shown for name in COMMANDS)
    assert not HEAVY & set(modules.split())


@pytest.mark.parametrize("name", [name for name, entry in COMMANDS.items() if entry.module == "cluster.commands.stack"])
def test_every_stack_command_has_examples(darkroom: Darkroom, name: str) -> None:
    run = darkroom(name, "--help")
    assert run.returncode == 0
    assert f"darkroom {name}" in run.stdout.partition("Examples")[2]


def test_every_command_can_be_imported_and_has_help(darkroom: Darkroom) -> None:
    for name in COMMANDS:
        run = darkroom(name, "--help")
        assert run.returncode == 0, f"{name}: {run.stderr}"


def test_unknown_command_is_a_usage_error_with_a_suggestion(darkroom: Darkroom) -> None:
    run = darkroom("statu")
    assert run.returncode == 2
    assert "Did you mean 'status'" in run.stderr


def test_version(darkroom: Darkroom) -> None:
    assert darkroom("--version").stdout == "darkroom 0.1.0\n"


@pytest.fixture
def broken_home(tmp_path: Path) -> Path:
    (tmp_path / "stack.json").write_text('{"version": 9}')
    return tmp_path


def test_an_error_fits_on_a_screen_without_a_traceback(darkroom: Darkroom, broken_home: Path) -> None:
    run = darkroom("--home", broken_home, "status")
    assert run.returncode == 1
    first, *details = run.stderr.splitlines()
    assert first == "error: The stack's state file is damaged."
    assert [line.split(":")[0].strip() for line in details] == ["value", "rule", "mend"]
    assert str(broken_home / "stack.json") in run.stderr


def test_debug_shows_the_traceback(darkroom: Darkroom, broken_home: Path) -> None:
    run = darkroom("--home", broken_home, "--debug", "status")
    assert run.returncode == 1
    assert "Traceback" in run.stderr


def test_an_unexpected_error_is_one_screen_and_its_traceback_a_file(darkroom: Darkroom, tmp_path: Path) -> None:
    (tmp_path / "stack.json").mkdir()
    run = darkroom("--home", tmp_path, "status")
    assert run.returncode == 1
    assert "unexpected error: IsADirectoryError" in run.stderr
    assert "Traceback" not in run.stderr
    (written,) = (tmp_path / "logs").glob("error-*.txt")
    assert str(written) in run.stderr
    assert "Traceback" in written.read_text()
