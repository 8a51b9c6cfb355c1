from __future__ import annotations

import dataclasses
import json
import os
import socket
import stat
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from cluster import components, lifecycle, processes, stack
from cluster.components import Ports
from cluster.console import say
from cluster.dashboard import Dashboard
from cluster.stack import Stack
from cluster.state import State
from training import agent
from training.errors import StackError, UsageError

Darkroom = Callable[..., "subprocess.CompletedProcess[str]"]

PORTS = Ports(**dict(zip(Ports.model_fields, processes.free_ports(len(Ports.model_fields)), strict=True)))
"""Free ones; nothing is started on them."""


@pytest.fixture
def held_port() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def pids(home: Path) -> dict[str, int | None]:
    return {part.name: part.pid for part in stack.status(home)}


def test_found_again_and_started_once(running: Stack) -> None:
    before = pids(running.home)
    assert stack.ensure(running.home, say) == running
    assert stack.find(running.home) == running
    assert pids(running.home) == before
    assert all(part.state == "running" for part in stack.status(running.home))


@pytest.fixture
def running(stack: Stack) -> Stack:
    """The session's stack; `stack` is the module here."""
    return stack


def test_up_again_prints_the_same_addresses(running: Stack, darkroom: Darkroom) -> None:
    run = darkroom("up", "--json")
    assert run.returncode == 0, run.stderr
    shown = json.loads(run.stdout)
    assert shown["stack"]["mlflow_url"] == running.mlflow_url
    assert shown["stack"]["serve_port"] == running.serve_port
    assert {part["name"]: part["state"] for part in shown["components"]} == dict.fromkeys(
        ("ray", "mlflow", "forks"), "running"
    )
    assert shown["resources"]["CPU"]["total"] >= 1


def test_status_lists_components_and_resources(running: Stack, darkroom: Darkroom) -> None:
    run = darkroom("status")
    assert run.returncode == 0, run.stderr
    assert running.mlflow_url in run.stdout
    assert running.dashboard_url in run.stdout
    assert "CPU:" in run.stdout


def test_a_running_stack_keeps_its_ports(running: Stack, darkroom: Darkroom) -> None:
    run = darkroom("up", "--mlflow-port", "5000")
    assert run.returncode == 2
    assert "The stack already runs with another mlflow port." in run.stderr
    assert "darkroom down" in run.stderr


def test_ray_refuses_strangers(running: Stack) -> None:
    for path in ("/api/version", "/api/jobs/", "/api/serve/applications/"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(running.dashboard_url + path, timeout=10)
        assert caught.value.code == 401, path


def test_mlflow_refuses_foreign_host_names(running: Stack) -> None:
    reply = httpx.get(f"{running.mlflow_url}/api/2.0/mlflow/experiments/search", headers={"Host": "evil.example"})
    assert reply.status_code == 403


def test_the_token_is_secret(running: Stack) -> None:
    assert running.token_path is not None
    assert stat.S_IMODE(running.token_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(components.temp_dir(running.home).stat().st_mode) == 0o700
    token = running.token_path.read_bytes()
    assert len(token) == 64
    logs = [*running.home.rglob("*"), *components.temp_dir(running.home).rglob("*")]
    readable = [path for path in logs if path.is_file() and path != running.token_path]
    assert any(path.suffix == ".log" for path in readable)
    assert [path for path in readable if token in path.read_bytes()] == []
    told = [process.cmdline() for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"]]
    assert not [words for words in told if any(token.decode() in word for word in words)]


def test_a_driver_joins_with_the_token(ray_session: Stack) -> None:
    import ray

    @ray.remote(num_cpus=0.1)
    def surroundings() -> tuple[str, bool]:
        import os

        return os.environ["MLFLOW_TRACKING_URI"], "RAY_AUTH_TOKEN" in os.environ

    assert ray.get(surroundings.remote(), timeout=60) == (ray_session.mlflow_url, False)
    assert ray.cluster_resources()["CPU"] == ray_session.dashboard.resources()["CPU"]["total"]


def test_a_port_in_use_is_refused_with_its_owner(darkroom: Darkroom, tmp_path: Path, held_port: int) -> None:
    run = darkroom("--home", tmp_path, "up", "--mlflow-port", str(held_port))
    assert run.returncode == 2
    assert "The port for --mlflow-port is in use by process" in run.stderr
    assert str(held_port) in run.stderr
    assert "options: --mlflow-port" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "stack.json").exists()


def test_a_second_stack_lives_and_dies_beside_the_first(
    running: Stack, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Also: MLflow comes back on its port with its data, and a stopped stack leaves no process and no socket."""
    before = pids(running.home)
    home = tmp_path_factory.mktemp("second")
    second = stack.ensure(home, say)
    try:
        assert not {second.dashboard_url, second.mlflow_url, second.ray_address} & {
            running.dashboard_url,
            running.mlflow_url,
            running.ray_address,
        }
        _kill_mlflow_and_come_back(second)
        members = [
            process
            for name in ("ray", "mlflow")
            for process in processes.family(None, f"{components.mark(home)}/{name}")
        ]
        assert len(members) > 4
    finally:
        count = stack.stop(home)
    assert count >= len(members)
    assert not [process for process in members if process.is_running()]
    assert not components.temp_dir(home).exists()
    assert stack.find(home) is None
    assert {part.state for part in stack.status(home)} == {"stopped"}
    assert stack.stop(home) == 0
    assert pids(running.home) == before
    assert all(part.state == "running" for part in stack.status(running.home))


def _kill_mlflow_and_come_back(second: Stack) -> None:
    api = f"{second.mlflow_url}/api/2.0/mlflow"
    httpx.post(f"{api}/experiments/create", json={"name": "kept"}, timeout=30).raise_for_status()
    before = pids(second.home)
    for process in processes.family(None, f"{components.mark(second.home)}/mlflow"):
        process.kill()
    assert processes.wait_until(lambda: stack.find(second.home) is None, 10)
    assert {part.name: part.state for part in stack.status(second.home)} == {
        "ray": "running",
        "mlflow": "stopped",
        "forks": "running",
    }
    assert stack.ensure(second.home, say) == second
    after = pids(second.home)
    assert after["ray"] == before["ray"]
    assert after["mlflow"] not in (None, before["mlflow"])
    found = httpx.get(f"{api}/experiments/get-by-name", params={"experiment_name": "kept"}, timeout=30)
    assert found.json()["experiment"]["name"] == "kept"


def test_changed_code_leaves_the_running_fork_server_alone(running: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training may run below it; agents of the changed code start a server of their own."""
    before = {part.name: (part.pid, part.address) for part in stack.status(running.home)}
    monkeypatch.setattr(agent, "socket_path", lambda *_: Path("/nowhere/changed-code.sock"))
    said: list[str] = []
    assert stack.ensure(running.home, said.append) == running
    assert said == []
    assert {part.name: (part.pid, part.address) for part in stack.status(running.home)} == before
    assert all(part.state == "running" for part in stack.status(running.home))


def test_a_proxy_of_the_user_s_is_not_asked_for_the_stack(running: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "MLFLOW_TRACKING_URI", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so that `use` is undone
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "intranet.example")
    monkeypatch.setenv("no_proxy", "")
    # openers of their own: urlopen keeps the proxies of its first call in this process
    with pytest.raises(urllib.error.URLError):
        urllib.request.build_opener().open(f"{running.mlflow_url}/health", timeout=10)
    stack.use(running)
    assert urllib.request.build_opener().open(f"{running.mlflow_url}/health", timeout=10).read() == b"OK"
    assert os.environ["NO_PROXY"] == "intranet.example,127.0.0.1,localhost"
    for part in components.components(running.home, PORTS, {}):
        assert "127.0.0.1" in part.environment["no_proxy"], part.name


def test_the_user_s_mlflow_does_not_reach_the_components(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    monkeypatch.setenv("MLFLOW_REGISTRY_STORE_URI", "sqlite:///elsewhere.db")
    for part in components.components(tmp_path, PORTS, {}):
        assert not [value for value in part.environment.values() if "elsewhere" in value], part.name


def test_a_component_that_is_slow_to_answer_is_waited_for_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "SILENCE_S", 0.1)
    looks = iter(range(100))
    part = dataclasses.replace(
        components.components(tmp_path, PORTS, {})[1], name="slow", healthy=lambda: next(looks) > 2
    )
    record = processes.start(["sleep", "600"], mark="test/slow", environment=os.environ, log=tmp_path / "log")
    said: list[str] = []
    try:
        assert lifecycle.runs(part, State(ports=PORTS, processes={"slow": record}), said.append)
    finally:
        processes.stop(record, "test/slow", grace_s=5)
    (line,) = said
    assert line.startswith("slow lives and does not answer on http://127.0.0.1:")


def test_down_finds_what_runs_without_its_folder(tmp_path: Path) -> None:
    home = tmp_path / "removed"
    marked = f"{components.mark(home)}/ray"
    record = processes.start(["sleep", "600"], mark=marked, environment=os.environ, log=tmp_path / "log")
    other = processes.start(["sleep", "600"], mark="another/ray", environment=os.environ, log=tmp_path / "log")
    said: list[str] = []
    try:
        assert stack.stop(home, said.append) == 1
        assert record.find() is None
        assert other.find() is not None
    finally:
        processes.stop(other, "another/ray", grace_s=5)
    assert said == ["stopping 1 processes of a stack whose folder is gone"]
    assert not home.exists()


def test_a_wish_never_gets_the_port_of_another_component(darkroom: Darkroom, tmp_path: Path) -> None:
    State(ports=PORTS, processes={}).write(tmp_path)
    settled = stack._settle_ports(State.read(tmp_path), {"serve": PORTS.mlflow}).ports
    assert settled.serve == PORTS.mlflow
    assert settled.ray == PORTS.ray
    assert len(set(settled.model_dump().values())) == len(settled.model_dump())
    run = darkroom("--home", tmp_path / "new", "up", "--serve-port", PORTS.ray, "--mlflow-port", PORTS.ray)
    assert run.returncode == 2
    assert "Two of the ports are one." in run.stderr


def test_a_token_is_whole_or_absent(tmp_path: Path) -> None:
    (tmp_path / "token.part").write_text("half")
    components._make_token(tmp_path / "token")
    assert len((tmp_path / "token").read_text()) == 64
    assert [path.name for path in tmp_path.iterdir()] == ["token"]
    (tmp_path / "token").write_text("")
    with pytest.raises(StackError, match="token is empty"):
        components._make_token(tmp_path / "token")


def test_a_token_s_file_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(StackError, match="token cannot be read") as caught:
        Dashboard("http://127.0.0.1:9").get("/api/version")
    assert str(tmp_path / "none") in caught.value.as_text()


def test_down_where_nothing_runs(darkroom: Darkroom, tmp_path: Path) -> None:
    run = darkroom("--home", tmp_path / "nothing", "down")
    assert run.returncode == 0
    assert "nothing ran in" in run.stderr
    assert not (tmp_path / "nothing").exists()


def test_a_recycled_pid_is_nobody_of_ours() -> None:
    bystander = psutil.Process()
    record = processes.ProcessRecord(pid=bystander.pid, created_s=bystander.create_time() - 100)
    assert record.find() is None
    assert processes.family(record, "no/such") == []
    assert processes.stop(record, "no/such", grace_s=1) == 0


def test_a_component_that_ends_at_once_is_reported_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.joinpath("mlflow").mkdir()
    tmp_path.joinpath("mlflow", "mlflow.db").write_bytes(b"not a database" * 100)
    with pytest.raises(StackError) as caught:
        stack.ensure(tmp_path, say)
    text = caught.value.as_text()
    assert "mlflow ended while it started" in text or "mlflow does not answer" in text
    assert "not a database" in text
    assert str(tmp_path / "logs" / "mlflow.log") in text
    assert {part.state for part in stack.status(tmp_path)} == {"stopped"}
    assert not components.temp_dir(tmp_path).exists()


@pytest.mark.parametrize("port", [80, 70_000])
def test_impossible_ports(port: int) -> None:
    with pytest.raises(UsageError, match="1024 <= port <= 65535"):
        processes.require_free(port, "--serve-port")
