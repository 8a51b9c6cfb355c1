"""Tracking against a real MLflow server: what a run holds, outages, resuming, secrets."""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from training.errors import TrackingError
from training.provenance import flatten, mask_secrets, provenance_tags
from training.tracking import RunContext, Tracker, connect, require_server

_NOWHERE = "http://127.0.0.1:9"


def _until(condition: Callable[[], bool], what: str, deadline_s: float = 60) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"waited {deadline_s} s for {what}"
        time.sleep(0.05)


def _context(uri: str, run_dir: Path, **changes: Any) -> RunContext:
    config = {"model": {"widths": [8, 16], "max_tokens": 24}, "store": {"secret_key": "hush", "url": "s3://a:b@host/x"}}
    options: dict[str, Any] = {"experiment": "tests", "name": "a run", "config": config, "tags": {"ray.trial_id": "t1"}}
    options |= {"dataset_path": "/data/faces", "dataset_hash": "ab" * 32}
    return RunContext(uri=uri, run_dir=run_dir, **(options | changes))


def test_a_run_holds_everything(mlflow_uri: str, tmp_path: Path) -> None:
    parent = Tracker.open(_context(mlflow_uri, tmp_path / "parent", name="sweep"))
    tracker = Tracker.open(_context(mlflow_uri, tmp_path / "run", parent_run_id=parent.run_id))
    for step in range(1200):
        tracker.log_metrics(step, {"loss": 1 / (step + 1), "learning_rate": 0.1})
    tracker.log_image(Image.new("RGB", (40, 20), (9, 99, 9)), "contact sheet", 7)
    tracker.log_tag("data.use_digest", "cd" * 16)
    (tmp_path / "note.txt").write_text("hello")
    tracker.log_artifact(tmp_path / "note.txt", "notes")
    assert tracker.close("FINISHED", timeout_s=60) == 0
    parent.close("FINISHED", timeout_s=60)

    client = connect(mlflow_uri)
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "a run")
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert run.data.tags["ray.trial_id"] == "t1"
    assert run.data.tags["darkroom.data_hash"] == "ab" * 32
    assert run.data.tags["data.use_digest"] == "cd" * 16
    assert run.data.params["model.widths"] == "[8, 16]"
    assert "system/cpu_utilization_percentage" in run.data.metrics
    (given,) = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("faces", ("ab" * 32)[:36])
    assert json.loads(given.dataset.source) == {"uri": "/data/faces"}
    history = client.get_metric_history(tracker.run_id, "loss")
    assert sorted(point.step for point in history) == list(range(1200))
    (picture,) = [f.path for f in client.list_artifacts(tracker.run_id, "images") if f.path.endswith(".png")]
    assert "contact sheet+step+7" in picture
    assert Path(client.download_artifacts(tracker.run_id, "notes/note.txt", str(tmp_path))).read_text() == "hello"
    local = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in local] == list(range(1200))


def test_secrets_stay_here(mlflow_uri: str, tmp_path: Path) -> None:
    tracker = Tracker.open(_context(mlflow_uri, tmp_path / "run", tags={"api_token": "hush", "plain": "p"}))
    tracker.close(timeout_s=60)
    client = connect(mlflow_uri)
    run = client.get_run(tracker.run_id)
    text = Path(client.download_artifacts(tracker.run_id, "config.yaml", str(tmp_path))).read_text()
    assert "hush" not in text + str(run.data.params) + str(run.data.tags)
    assert run.data.params["store.secret_key"] == "***"
    assert run.data.params["store.url"] == "s3://***@host/x"
    assert run.data.params["model.max_tokens"] == "24", "numbers are no secrets"
    assert run.data.tags["plain"] == "p"


def test_the_same_directory_goes_on_with_the_same_run(
    mlflow_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Tracker.open(_context(mlflow_uri, tmp_path / "run"))
    first.log_metrics(1, {"loss": 1.0})
    first.close("FAILED", timeout_s=60)
    again = Tracker.open(_context(mlflow_uri, tmp_path / "run", config={"model": {"widths": [9]}, "new": 1}))
    client = connect(mlflow_uri)
    assert again.run_id == first.run_id
    assert client.get_run(again.run_id).info.status == "RUNNING"
    again.log_metrics(2, {"loss": 0.5})
    again.close("FINISHED", timeout_s=60)
    run = client.get_run(again.run_id)
    assert run.info.status == "FINISHED"
    assert len(run.inputs.dataset_inputs) == 1
    assert (run.data.params["model.widths"], run.data.params["new"]) == ("[8, 16]", "1")
    assert "other values of model.widths" in caplog.text
    assert [p.step for p in client.get_metric_history(again.run_id, "loss")] == [1, 2]


def test_a_refused_record_is_named_and_holds_nothing_up(
    mlflow_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker.open(_context(mlflow_uri, tmp_path / "run"))
    tracker.log_artifact(tmp_path / "missing.bin")
    tracker.log_image(Image.new("RGB", (4, 4)), "bad:key", 1)
    tracker.log_metrics(5, {"loss": 2.0})
    assert tracker.close("FINISHED", timeout_s=60) == 2
    assert "missing.bin" in caplog.text
    assert "bad:key" in caplog.text
    run = connect(mlflow_uri).get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics["loss"]) == ("FINISHED", 2.0)


def test_it_works_in_a_forked_process(mlflow_uri: str, tmp_path: Path) -> None:
    connect(mlflow_uri).search_experiments()  # the parent has imported MLflow and holds a connection
    child = os.fork()
    if child == 0:
        code = 1
        try:
            tracker = Tracker.open(_context(mlflow_uri, tmp_path / "run"))
            tracker.log_metrics(1, {"loss": 1.5})
            code = tracker.close("FINISHED", timeout_s=60)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    run_id = json.loads((tmp_path / "run/mlflow_run.json").read_text())["run_id"]
    assert connect(mlflow_uri).get_run(run_id).data.metrics["loss"] == 1.5


class _Server:
    """A server that can be killed and started again on its port."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.home = home
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        store = ["--backend-store-uri", f"sqlite:///{self.home}/mlflow.db", "--serve-artifacts"]
        store += ["--artifacts-destination", str(self.home / "artifacts")]
        address = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *store, *address],
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # eight processes less
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        _until(self.answers, "the MLflow server")

    def answers(self) -> bool:
        try:
            require_server(self.uri, timeout_s=1)
        except TrackingError:
            return False
        return True

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
        _until(lambda: not self.answers(), "the server's end")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[_Server]:
    (tmp_path / "server").mkdir()
    server = _Server(tmp_path / "server")
    server.start()
    yield server
    server.kill()


def test_a_killed_server_is_waited_for_and_caught_up_with(
    server: _Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tracker = Tracker.open(_context(server.uri, tmp_path / "run"))
    tracker.log_metrics(0, {"loss": 0.0})
    _until(lambda: "loss" in connect(server.uri).get_run(tracker.run_id).data.metrics, "the first metric")
    server.kill()
    began = time.monotonic()
    for step in range(1, 300):
        tracker.log_metrics(step, {"loss": float(step)})
    assert time.monotonic() - began < 1, "the loop does not feel the outage"
    _until(lambda: "MLflow is away" in caplog.text, "the warning")
    server.start()
    _until(lambda: "MLflow is back" in caplog.text, "the recovery")
    tracker.log_metrics(300, {"loss": 300.0})
    assert tracker.close("FINISHED", timeout_s=60) == 0
    history = connect(server.uri).get_metric_history(tracker.run_id, "loss")
    assert sorted(point.step for point in history) == list(range(301))
    assert caplog.text.count("MLflow is away") == 1

    lost = Tracker.open(_context(server.uri, tmp_path / "other"))
    server.kill()
    lost.log_metrics(1, {"loss": 1.0})
    began = time.monotonic()
    undelivered = lost.close("FINISHED", timeout_s=2)
    assert undelivered >= 2, "the metric and the status"
    assert time.monotonic() - began < 5
    assert json.loads((tmp_path / "other/metrics.jsonl").read_text())["loss"] == 1.0


def test_a_server_that_starts_late_is_waited_for(
    server: _Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.kill()
    with ThreadPoolExecutor(1) as beside:
        opening = beside.submit(Tracker.open, _context(server.uri, tmp_path / "run"), 120.0)
        _until(lambda: "MLflow is asked again" in caplog.text, "the first refusal")
        server.start()
        tracker = opening.result(60)
    assert tracker.close("FINISHED", timeout_s=60) == 0


def test_no_server_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"cannot be reached.\n.*127.0.0.1:9(.*\n)*.*mend: .*darkroom up"):
        Tracker.open(_context(_NOWHERE, tmp_path / "run"), patience_s=0)
    assert not (tmp_path / "run").exists(), "nothing half-written"
    with pytest.raises(TrackingError, match=r"http\(s\)://host:port"):
        require_server("sqlite:///mlflow.db")


@pytest.fixture
def garbage() -> Iterator[int]:
    """A port where something answers that speaks no HTTP."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def answer() -> None:
            with contextlib.suppress(OSError):  # the test is over
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        connection.recv(4096)
                        connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        threading.Thread(target=answer, daemon=True).start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)


def test_what_answers_and_is_no_server_is_one_clear_error(garbage: int, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"cannot be reached.\n(.*\n)*.*SSH-2.0") as caught:
        Tracker.open(_context(f"http://me:hush@127.0.0.1:{garbage}", tmp_path / "run"), patience_s=0)
    assert "hush" not in str(caught.value)
    assert "http://***@127.0.0.1" in str(caught.value)


def test_no_proxy_stands_before_this_machine(mlflow_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, _NOWHERE)
    monkeypatch.setenv("no_proxy", "example.org")
    require_server(mlflow_uri)
    assert connect(mlflow_uri).search_experiments()
    assert os.environ["no_proxy"].startswith("example.org,"), "what the user said stays"


def test_a_login_is_not_taken_for_a_port(mlflow_uri: str) -> None:
    require_server(mlflow_uri.replace("://", "://me:hush@"))


def test_provenance(tmp_path: Path) -> None:
    (tmp_path / "requirements.lock").write_text("torch==2.13.0\n")
    tags = provenance_tags(tmp_path)
    assert "mlflow.source.git.commit" not in tags
    assert tags["mlflow.source.name"] == "darkroom"
    assert len(tags["darkroom.lock_sha256"]) == 64
    assert tags["darkroom.version.mlflow"].startswith("3.")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *arguments], check=True)
    tags = provenance_tags(tmp_path)
    assert (len(tags["mlflow.source.git.commit"]), tags["darkroom.git_dirty"]) == (40, "false")
    (tmp_path / "requirements.lock").write_text("torch==0\n")
    assert provenance_tags(tmp_path)["darkroom.git_dirty"] == "true"


def test_masking_and_flattening() -> None:
    masked = mask_secrets({"a": {"Password": "x", "inner": [{"api_key": "y", "n": 1}]}, "tokens": {"v": ["z"]}})
    assert masked == {"a": {"Password": "***", "inner": [{"api_key": "***", "n": 1}]}, "tokens": {"v": ["***"]}}
    assert flatten({"a": {"b": {}, "c": "x" * 600}}) == {"a.b": "{}", "a.c": "x" * 497 + "..."}
