from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import jobs
from cluster.processes import free_ports
from cluster.stack import Stack
from training.errors import StackError, UsageError

SUBMIT = """
import sys
from pathlib import Path
from cluster import jobs, stack
found = stack.find(Path(sys.argv[1]))
stack.use(found)
sys.exit(jobs.submit(found.dashboard_url, sys.argv[2:], environment={"GREETING": "hello"}))
"""


def submit(stack: Stack, *argv: str) -> list[str]:
    return [sys.executable, "-c", SUBMIT, str(stack.home), *argv]


def test_a_job_s_logs_are_followed_and_its_exit_code_is_ours(stack: Stack) -> None:
    program = "import os, sys; print(os.environ['GREETING'], 'from a job'); sys.exit(7)"
    run = subprocess.run(
        submit(stack, "python", "-c", program), capture_output=True, text=True, timeout=120, check=False
    )
    assert "hello from a job" in run.stdout
    assert "Ctrl-C stops it" in run.stderr
    assert run.returncode == 7, run.stderr


def test_a_command_runs_as_a_job_in_its_own_stack(stack: Stack) -> None:
    """The job runs our own command line, finds the surrounding cluster, and succeeds."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom rich.console import Console\n"
        "from cluster import jobs\nfrom cluster.console import Session\n"
        "session = Session(Path(sys.argv[1]), False, Console())\n"
        "argv = ['status', '--json', '--address', sys.argv[2]]\n"
        "sys.exit(jobs.run_remotely(sys.argv[2], argv, session))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(stack.home), stack.dashboard_url],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    shown = json.loads(run.stdout[run.stdout.index("\n{") :])
    assert shown["stack"]["mlflow_url"] == stack.mlflow_url


def test_inside_a_job_the_surrounding_cluster_is_current(stack: Stack) -> None:
    program = (
        "from pathlib import Path; from cluster.stack import attach;"
        f"print('HOME', attach(Path({str(stack.home)!r}), print)); print('ELSE', attach(Path('elsewhere'), print))"
    )
    run = subprocess.run(
        submit(stack, "python", "-c", program), capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr + run.stdout
    ours, other = (next(line for line in run.stdout.splitlines() if line.startswith(word)) for word in ("HOME", "ELSE"))
    assert ours == f"HOME {stack}"
    assert stack.mlflow_url in other
    assert stack.dashboard_url in other


def test_ctrl_c_stops_the_job(stack: Stack, tmp_path: Path) -> None:
    started = tmp_path / "started"
    program = f"import pathlib, threading; pathlib.Path({str(started)!r}).touch(); threading.Event().wait()"
    caller = subprocess.Popen(
        submit(stack, "python", "-c", program), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + 60
        while not started.exists() and time.monotonic() < end:
            time.sleep(0.1)
        caller.send_signal(signal.SIGINT)
        _, errors = caller.communicate(timeout=60)
    finally:
        caller.kill()
    job = next(word for word in errors.split() if word.startswith("raysubmit_"))
    assert f"stopping job {job}" in errors
    assert stack.dashboard.get(f"/api/jobs/{job}")["status"] == "STOPPED"


def test_nobody_at_the_address() -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    began = time.monotonic()
    with pytest.raises(StackError) as caught:
        jobs.submit(address, ["true"])
    assert time.monotonic() - began < 10
    text = caught.value.as_text()
    assert "Ray's dashboard does not answer" in text
    assert address in text
    assert "darkroom status" in text


def test_somebody_else_at_the_address(stack: Stack) -> None:
    with pytest.raises(StackError, match="This is not a Ray dashboard"):
        jobs.submit(stack.mlflow_url, ["true"])


def test_a_refused_token(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(StackError, match="refuses our token"):
        jobs.submit(stack.dashboard_url, ["true"])


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "http://head:port", "http://:8265", ""])
def test_addresses_of_another_kind(address: str) -> None:
    with pytest.raises(UsageError) as caught:
        jobs.submit(address, ["true"])
    text = caught.value.as_text()
    assert "not ray:// or the GCS port" in text
    assert "no --address: the local stack" in text


def test_the_address_stays_here() -> None:
    argv = ["train", "--address", "http://a:1", "-s", "x=1", "--address=http://a:1", "--json"]
    assert jobs.without_option(argv, "--address") == ["train", "-s", "x=1", "--json"]


def test_a_recipe_travels_with_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, folder = tmp_path / "here", tmp_path / "job"
    (here / "recipes").mkdir(parents=True)
    folder.mkdir()
    (here / "recipes" / "mine.yaml").write_text("base: demo")
    (tmp_path / "outside.yaml").write_text("secret")
    monkeypatch.chdir(here)
    words = ["train", "recipes/mine.yaml", "../outside.yaml", "--data", "recipes", str(here / "recipes" / "mine.yaml")]
    assert jobs.stage_files(words, folder) == [Path("recipes/mine.yaml")]
    assert [path.relative_to(folder) for path in folder.rglob("*.yaml")] == [Path("recipes/mine.yaml")]
