"""The fork server and its processes: started once, told everything, killed, abandoned, stopped and lied to."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from training import agent, checkpoint
from training.errors import TrainingError

LONG = 100_000
"""Steps of a run that is not to end by itself."""


def broken(runs: Any) -> dict[str, Any]:
    """A spec that is refused at once."""
    spec = {"config": {"steps": 0, "data": {}}, "run_dir": str(runs.folder), "rank": 0, "local_rank": 0, "world": 1}
    return {**spec, "address": "127.0.0.1", "port": 1}


def test_the_server_is_started_once_for_all_who_ask_at_the_same_time(runs: Any, peer_of: Callable[..., int]) -> None:
    """Also where the socket of a server that was killed still lies about."""
    runs.server = runs.folder / "s.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(runs.server))
        dead.listen()
    servers: set[int] = set()

    def ask(number: int) -> None:
        launched = runs.launch("train", broken(runs), runs.folder / f"{number}.log")
        servers.add(peer_of(launched.process._connection))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(servers) == 1
    assert [launched.end() for launched in runs.launched] == [2] * 4, "each forked, told, and refused its recipe"
    os.kill(servers.pop(), signal.SIGTERM)


def test_a_run_tells_of_everything_in_order(runs: Any) -> None:
    began = time.time()
    config = runs.config(evaluation={"every_steps": 3}, checkpoint={"every_steps": 2, "keep": 2})
    (rank,) = runs.start(config, "run")
    assert rank.end() == 0
    marks = {event["name"]: event["time_s"] - began for event in rank.told("mark")}
    assert list(marks) == ["process forked", "process group joined", "captions encoded", "engine built", "first step"]
    print("seconds since the launch:", {name: round(seconds, 2) for name, seconds in marks.items()})  # noqa: T201
    assert [event["step"] for event in rank.told("step")] == [1, 2, 3, 4, 5, 6]
    metrics = rank.told("step")[0]["metrics"]
    measured = {"loss", "gradient_norm", "learning_rate", "images_per_s", "skipped_samples", "left_out_steps"}
    parts = ("data", "forward", "backward", "communication", "optimizer", "checkpoint")
    measured |= {f"time/{part}_s" for part in parts}
    assert set(metrics) == measured
    assert [event["step"] for event in rank.told("evaluation")] == [3, 6]
    assert all(event["metrics"]["held_out_loss"] > 0 for event in rank.told("evaluation"))
    assert [event["step"] for event in rank.told("checkpoint")] == [2, 4, 6]
    assert rank.told("done") == [{"event": "done", "step": 6, "stopped": False}]
    assert rank.events[-1] == {"event": "exit", "code": 0}
    with Image.open(rank.told("samples")[0]["path"]) as sheet:
        sheet.verify()
    found, refused = checkpoint.newest(runs.folder / "run" / "checkpoints")
    assert found is not None
    assert (found.step, found.position, refused) == (6, 48, [])
    assert len(list((runs.folder / "run" / "checkpoints").iterdir())) == 2


def test_the_ranks_of_a_run_agree_and_the_first_speaks(runs: Any) -> None:
    first, second = runs.start(runs.config(workers={"count": 2}), "two", world=2)
    assert (first.end(), second.end()) == (0, 0)
    assert len(first.told("step")) == 6
    assert second.told("step") == second.told("checkpoint") == second.told("samples") == []
    assert first.told("evaluation") == second.told("evaluation"), "the same loss on every rank"
    assert first.told("done") == second.told("done")


def test_a_killed_process_is_reported_with_its_signal(runs: Any, running_process: Callable[..., int]) -> None:
    (rank,) = runs.start(runs.config(steps=LONG, checkpoint={"every_steps": 3}), "killed")
    rank.until("checkpoint")
    rank.until("step")
    os.kill(running_process(rank.log), signal.SIGKILL)
    assert rank.end() == -signal.SIGKILL
    found, refused = checkpoint.newest(runs.folder / "killed" / "checkpoints")
    assert found is not None
    assert found.step % 3 == 0
    assert refused == []


def test_a_lost_rank_ends_the_other_in_words(runs: Any, running_process: Callable[..., int]) -> None:
    first, second = runs.start(runs.config(steps=LONG, workers={"count": 2}), "lost", world=2)
    first.until("step")
    os.kill(running_process(second.log), signal.SIGKILL)
    assert second.end() == -signal.SIGKILL
    assert first.end() == 1
    (error,) = first.told("error")
    assert "typed" not in error
    assert "Traceback" in first.log.read_text()


def test_a_process_never_outlives_its_keeper(
    runs: Any, running_process: Callable[..., int], look: Callable[..., None]
) -> None:
    (rank,) = runs.start(runs.config(steps=LONG), "orphan")
    rank.until("step")
    pid = running_process(rank.log)
    keeper = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[1])
    os.kill(keeper, signal.SIGKILL)
    look(lambda: running_process(rank.log) is None, "the training process ends with its keeper")


def test_stop_checkpoints_and_leaves(runs: Any) -> None:
    (rank,) = runs.start(runs.config(steps=LONG), "stopped")
    rank.until("step")
    rank.process.stop()
    assert rank.end() == 0
    (done,) = rank.told("done")
    assert done["stopped"] is True
    assert 1 <= done["step"] < LONG
    assert [event["step"] for event in rank.told("checkpoint")] == [done["step"]]


def test_a_stop_that_comes_together_with_the_request_is_heard(runs: Any) -> None:
    """In one piece with it: before the training process exists, and so before it can handle a signal."""
    assert runs.launch("train", broken(runs), runs.folder / "first.log").end() == 2, "the server runs"
    (spec,) = runs.specs(runs.config(steps=LONG), "early")
    log = runs.folder / "early" / "rank-0.log"
    environment = {**os.environ, **runs.environment}
    request = {"task": "train", "spec": spec, "environment": environment, "log": str(log), "folder": str(runs.folder)}
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(str(runs.server))
    connection.sendall(json.dumps(request).encode() + b'\n{"stop": true}\n')
    rank = runs.follow(agent.TrainingProcess(connection), log)
    assert rank.end() == 0
    assert rank.told("done") == [{"event": "done", "step": 0, "stopped": True}]
    assert rank.told("step") == rank.told("checkpoint") == []


def test_events_can_be_waited_for_without_waiting_for_ever() -> None:
    ours, theirs = socket.socketpair()
    process = agent.TrainingProcess(ours)
    events = process.events(idle_s=0.01)
    assert next(events) == {"event": "idle"}
    theirs.sendall(b'{"event": "step", "st')
    assert next(events) == {"event": "idle"}, "half a line is none"
    theirs.sendall(b'ep": 1}\n{"event": "exit", "code": 0}\n{"event": "lost"}\n')
    assert list(events) == [{"event": "step", "step": 1}, {"event": "exit", "code": 0}]
    theirs.close()
    process.stop()  # too late, and no error: the process has left by itself
    process.close()


_AGENT = """
import json, signal, sys
from pathlib import Path
from training import agent
path, log, spec = sys.argv[1:]
process = agent.launch(Path(path), "train", json.loads(spec), Path(log))
for event in process.events():
    if event["event"] == "step":
        print("step", flush=True)
        signal.pause()
"""


@pytest.mark.parametrize("death", ["killed", "closed"])
def test_a_process_whose_agent_is_gone_checkpoints_and_leaves(
    runs: Any, running_process: Callable[..., int | None], look: Callable[..., None], death: str
) -> None:
    folder = runs.folder / death
    if death == "closed":
        (rank,) = runs.start(runs.config(steps=LONG), death)
        rank.until("step")
        rank.process.close()
    else:
        folder.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            place = {"address": "127.0.0.1", "port": probe.getsockname()[1], "rank": 0, "local_rank": 0, "world": 1}
        spec = json.dumps({"config": runs.config(steps=LONG), "run_dir": str(folder), **place})
        command = [sys.executable, "-c", _AGENT, str(runs.server), str(folder / "rank-0.log"), spec]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "step\n"
            process.kill()
    look(lambda: list(folder.glob("checkpoints/step-*")), "a checkpoint appears")
    look(lambda: running_process(folder / "rank-0.log") is None, "the process leaves")
    found, refused = checkpoint.newest(folder / "checkpoints")
    assert found is not None
    assert 1 <= found.step < LONG
    assert refused == []


def test_typed_errors_arrive_with_their_text_and_exit_code(runs: Any) -> None:
    nowhere = str(runs.folder / "nowhere")
    (rank,) = runs.start(runs.config(data={"path": nowhere}), "no-data")
    assert rank.end() == 1
    (error,) = rank.told("error")
    assert error["typed"] is True
    assert error["exit_code"] == 1
    assert nowhere in error["message"]
    (rank,) = runs.start(runs.config(model={"resolution": 9}), "bad-recipe")
    assert rank.end() == 2
    (error,) = rank.told("error")
    assert error["typed"] is True
    assert error["exit_code"] == 2
    assert "resolution 9 must be a multiple of 2" in error["message"]


def test_a_typed_error_reaches_every_rank(runs: Any) -> None:
    ranks = runs.start(runs.config(workers={"count": 2}, conditioning={"encoder": "/nowhere"}), "no-encoder", world=2)
    assert [rank.end() for rank in ranks] == [2, 2]
    for rank in ranks:
        assert "The text encoder cannot be found." in rank.told("error")[0]["message"]


def test_what_a_request_names_is_not_run(runs: Any) -> None:
    trace = runs.folder / "ran"
    for task, spec, code, told in [
        ("os.system", {"command": f"touch {trace}"}, 2, "There is no such task."),
        ("train", {"__class__": "os.system"}, 1, "TypeError"),
    ]:
        launched = runs.launch(task, spec, runs.folder / "lied.log")
        assert launched.end() == code
        (error,) = launched.told("error")
        assert told in error["message"]
    assert not trace.exists()


class _Touch:
    """Unpickled, it leaves a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.close, (os.open(self.path, os.O_CREAT | os.O_WRONLY),)


def test_what_is_no_request_is_dropped_and_the_server_goes_on(runs: Any, peer_of: Callable[..., int]) -> None:
    assert runs.launch("train", broken(runs), runs.folder / "before.log").end() == 2
    trace = runs.folder / "ran"
    payload = pickle.dumps(_Touch(trace))
    trace.unlink()
    pids = set()
    for rubbish in (payload + b"\n", b"{}\n", b"[1]\n", b"\n", b"no json\n", b"\xff\xfe\n"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(runs.server))
            connection.settimeout(30)
            connection.sendall(rubbish)
            connection.shutdown(socket.SHUT_WR)
            connection.makefile("rb").read()  # until the keeper is gone
            pids.add(peer_of(connection))
    assert not trace.exists()
    assert len(pids) == 1
    assert runs.launch("train", broken(runs), runs.folder / "after.log").end() == 2


def test_the_environment_and_folder_of_the_agent_are_the_processes(
    runs: Any, monkeypatch: pytest.MonkeyPatch, running_process: Callable[..., int]
) -> None:
    monkeypatch.setenv("DARKROOM_TEST", "of the agent")
    monkeypatch.chdir(runs.folder)
    (rank,) = runs.start(runs.config(steps=LONG), "place")
    rank.until("step")
    pid = running_process(rank.log)
    assert Path(f"/proc/{pid}/cwd").readlink() == runs.folder
    # the kernel shows the fork server's environment; the process itself has been given another
    assert "DARKROOM_TEST" not in Path(f"/proc/{pid}/environ").read_text()
    rank.process.stop()
    assert rank.end() == 0


def test_the_sockets_folder_is_its_owners_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = agent.socket_path("1234")
    assert path == agent.socket_path("1234"), "the same code and cluster, the same server"
    assert path != agent.socket_path("1235"), "another cluster has another"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.parent.stat().st_uid == os.getuid()
    path.parent.chmod(0o755)
    with pytest.raises(TrainingError, match="open to others") as caught:
        agent.socket_path("1234")
    assert str(path.parent) in str(caught.value)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The driver's GPUs, as the test sets them; returns what was asked of it."""
    import pynvml

    asked: list[str] = []
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: asked.append("init"))
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: asked.append("shutdown"))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    return asked


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "cuda"),
        ({"CUDA_VISIBLE_DEVICES": "1"}, "cuda"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "cpu"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "cpu"),
        ({"DS_ACCELERATOR": "cpu"}, "cpu"),
        ({"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": "0,1"}, "cuda"),
    ],
)
def test_gpus_and_cpu_have_fork_servers_of_their_own(
    gpus: list[str], environment: dict[str, str], expected: str
) -> None:
    assert agent.accelerator(environment) == expected
    same = {"cuda": {"CUDA_VISIBLE_DEVICES": "0"}, "cpu": {"DS_ACCELERATOR": "cpu"}}[expected]
    other = {"cuda": {"DS_ACCELERATOR": "cpu"}, "cpu": {}}[expected]
    assert agent.socket_path("1234", environment) == agent.socket_path("1234", same)
    assert agent.socket_path("1234", environment) != agent.socket_path("1234", other)
    assert gpus.count("init") == gpus.count("shutdown")


def test_the_fork_server_sees_every_gpu_and_asks_the_driver_only(
    gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import fork_server

    seen: list[dict[str, str | None]] = []
    names = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "PYTORCH_NVML_BASED_CUDA_CHECK")

    def stop_at_first_import(name: str) -> None:
        seen.append({name: os.environ.get(name) for name in names})
        raise ImportError(name)

    monkeypatch.setattr(fork_server.importlib, "import_module", stop_at_first_import)
    monkeypatch.setattr(fork_server, "_keep_freed_memory", lambda: None)  # it would change this process
    for mask in ("1", ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
        monkeypatch.setenv("DS_ACCELERATOR", "")
        monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "")
        with pytest.raises(ImportError):
            fork_server.serve(Path("unused"), None)
    assert [tuple(each.values()) for each in seen] == [(None, "cuda", "1"), ("", "cpu", "1")]


def test_the_agent_needs_neither_torch_nor_ray() -> None:
    code = "import sys, training.agent; assert not {'torch', 'ray', 'numpy', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
