from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from cluster import jobs, results
from cluster.console import Session
from cluster.processes import free_ports
from cluster.stack import Stack
from training.data.dataset import Dataset
from training.errors import StackError, UsageError

Darkroom = Callable[..., "subprocess.CompletedProcess[str]"]

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


def test_a_command_s_result_comes_alone_on_stdout(
    stack: Stack, darkroom: Darkroom, pictures: Path, tmp_path: Path
) -> None:
    """On the cluster, into the folder that is meant here, though it is named like a word of the command."""
    command = ("data", "build", "pictures", "data", "--held-out", "0.2", "--json", "--address", stack.dashboard_url)
    run = darkroom(*command, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    shown = json.loads(run.stdout)
    assert shown["path"] == str(tmp_path / "data")
    assert Dataset.open(tmp_path / "data").manifest.inputs == 12
    assert "Ctrl-C stops it" in run.stderr


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


def test_another_cluster_needs_an_absolute_home(tmp_path: Path) -> None:
    """Before anything is sent: below Ray's working directory, the next job would not find the run."""
    session = Session(tmp_path, False, Console(), home_is_absolute=False)
    with pytest.raises(UsageError) as caught:
        jobs.run_remotely("http://127.0.0.1:9", ["train"], session)
    text = caught.value.as_text()
    assert "storage that every node mounts" in text
    assert "--home /shared/darkroom" in text
    with pytest.raises(StackError, match="does not answer"):
        jobs.run_remotely("http://127.0.0.1:9", ["train"], Session(tmp_path, False, Console(), home_is_absolute=True))


def test_results_and_messages_are_told_apart() -> None:
    out, err = io.StringIO(), io.StringIO()
    splitter = results.Splitter(out, err)
    log = f"one\n{results.MARK}{{\ntwo {results.MARK}}}\n\nthree"
    for start in range(0, len(log), 5):  # pieces end anywhere, also within a mark
        splitter.take(log[start : start + 5])
    splitter.close()
    assert out.getvalue() == "{\n}\n"
    assert err.getvalue() == "one\ntwo \n\nthree"


def test_the_marker_passes_results_and_exit_codes_on() -> None:
    program = "import sys; print('a'); print('b', file=sys.stderr); print('c', end=''); sys.exit(3)"
    command = [sys.executable, "-m", "cluster.results", sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stderr) == (3, "b\n")
    assert run.stdout == f"{results.MARK}a\n{results.MARK}c\n"
