from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.cli import COMMANDS
from cluster.console import show_unexpected
from training.recipe_files import recipe_names

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


GROUPS = {"data": ("build", "show"), "models": ("list", "show", "promote", "rollback")}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(darkroom: Darkroom, name: str) -> None:
    for words in ([name], *([name, below] for below in GROUPS.get(name, ()))):
        run = darkroom(*words, "--help")
        assert run.returncode == 0, run.stderr
        assert f"darkroom {' '.join(words)}" in run.stdout.partition("Example")[2], words


@pytest.mark.parametrize("command", ["demo", "train"])
def test_the_help_names_every_packaged_recipe(darkroom: Darkroom, command: str) -> None:
    said = darkroom(command, "--help").stdout
    assert [name for name in recipe_names() if name not in said] == []


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


@pytest.mark.parametrize("command", [["up"], ["demo"], ["status"]])
def test_a_home_that_is_no_folder(darkroom: Darkroom, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "file").touch()
    run = darkroom("--home", tmp_path / "file", *command)
    assert run.returncode == 2
    assert "The home is not a folder." in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("command", ["up", "demo"])
def test_a_home_that_cannot_be_made(darkroom: Darkroom, command: str) -> None:
    run = darkroom("--home", "/proc/nope", command)
    assert run.returncode == 2
    assert "The home folder cannot be used." in run.stderr
    assert "options: --home FOLDER" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_traceback_finds_a_place_where_the_home_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    show_unexpected(ValueError("no good"), Path("/proc/nope"))
    (written,) = tmp_path.glob("darkroom-error-*.txt")
    assert "ValueError: no good" in written.read_text()
    assert str(written) in capsys.readouterr().err.replace("\n", "")
