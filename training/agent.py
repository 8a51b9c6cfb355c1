"""How an agent has a training process forked, follows it and stops it. Imports neither Ray nor torch.

    agent (a Ray worker) --unix socket--> fork server --fork--> keeper --fork--> training process

The other end of the socket is ``training.fork_server``, which is started by the first who asks and serves all
training processes of its node. Requests and events are JSON lines.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from training.errors import TrainingError

KILL = b'{"kill": true}\n'
"""Asks a keeper to kill its training process."""


def accelerator(environment: Mapping[str, str]) -> Literal["cuda", "cpu"]:
    """What a process with this environment computes on.

    Asks the driver and never CUDA, which must not be initialised before a fork.
    """
    masked = environment.get("CUDA_VISIBLE_DEVICES", "all").split(",")[0].strip()
    if environment.get("DS_ACCELERATOR") == "cpu" or masked in ("", "-1", "NoDevFiles"):
        return "cpu"
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return "cpu"
    try:
        return "cuda" if pynvml.nvmlDeviceGetCount() else "cpu"
    finally:
        pynvml.nvmlShutdown()


def socket_path(cluster: str, environment: Mapping[str, str] = os.environ) -> Path:
    """Where the fork server of this code, on this node, for one cluster, listens.

    Args:
        cluster: names the cluster, e.g. its GCS address, so that two stacks on one machine share nothing.
        environment: of the process to be forked. DeepSpeed settles for GPUs or the CPU once, when it is imported, so
            each has a server of its own.
    """
    code = hashlib.sha256(f"{sys.executable} {cluster} {accelerator(environment)}".encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        status = path.stat()
        code.update(f"{path}:{status.st_mtime_ns}:{status.st_size}".encode())
    folder = Path(tempfile.gettempdir()) / f"darkroom-agent-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise TrainingError(
            "The fork server's folder is open to others.", value=str(folder), rule="owned by you, mode 0700"
        )
    return folder / f"{code.hexdigest()[:16]}.sock"


class TrainingProcess:
    """A training process, seen from the agent.

    Args:
        connection: the socket to its keeper.

    Attributes:
        killed: whether ``kill`` was called.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.killed = False

    def events(self, idle_s: float | None = None) -> Iterator[dict[str, Any]]:
        """What the process reports, in order; the last is ``{"event": "exit", "code": ...}``.

        Args:
            idle_s: whenever nothing came for so long, an event ``idle`` is yielded.
        """
        waiter = select.poll()  # which, unlike select, takes any descriptor
        waiter.register(self._connection, select.POLLIN)
        pending = b""
        while True:
            if not waiter.poll(None if idle_s is None else idle_s * 1000):
                yield {"event": "idle"}
                continue
            part = self._connection.recv(65536)
            if not part:
                return
            *lines, pending = (pending + part).split(b"\n")
            for line in lines:
                event = json.loads(line)
                yield event
                if event["event"] == "exit":
                    return

    def stop(self) -> None:
        """Ask it to checkpoint and leave."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has left; its events say how
            self._connection.sendall(b'{"stop": true}\n')

    def kill(self) -> None:
        """End it at once, whatever it hangs in."""
        self.killed = True
        with contextlib.suppress(OSError):  # it has left, and may have been closed; its events say how it ended
            self._connection.sendall(KILL)

    def close(self) -> None:
        """Let go: a process that still runs is asked to checkpoint and leave, and killed after a while."""
        with contextlib.suppress(OSError):  # the keeper may have gone first
            self._connection.shutdown(socket.SHUT_RDWR)  # closing alone waits for whoever still reads events
        self._connection.close()


def launch(
    path: Path,
    task: Literal["train", "publish", "forecast", "self_test"],
    spec: Mapping[str, Any],
    log: Path,
    environment: Mapping[str, str] = os.environ,
) -> TrainingProcess:
    """Fork a training process, starting the fork server first where there is none.

    Args:
        path: the fork server's socket.
        task: which part of ``training.worker`` runs.
        spec: what it is told; JSON.
        log: file that gets the process's output.
        environment: the process's; the same as the socket's.

    Raises:
        TrainingError: the fork server does not start.
    """
    connection = _connect(path) or _start_server(path, environment)
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if accelerator(environment) == "cpu" else {}
    request = {
        "task": task,
        "spec": dict(spec),
        "environment": {**environment, **hidden},
        "log": str(log),
        "folder": str(Path.cwd()),
    }
    connection.sendall(json.dumps(request).encode() + b"\n")
    return TrainingProcess(connection)


def _connect(path: Path) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    return connection


def _start_server(path: Path, environment: Mapping[str, str], wait_s: float = 180.0) -> socket.socket:
    """Start the server as a daemon, once per node however many agents ask at the same time."""
    log = path.with_suffix(".log")
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        connection = _connect(path)
        if connection:
            return connection
        # In a session of its own and orphaned at once: Ray ends the children of a worker with the worker.
        command = [sys.executable, "-m", "training.agent", "start", "--socket", str(path), "--idle-s", "900"]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, env=dict(environment))
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            connection = _connect(path)
            if connection:
                return connection
            time.sleep(0.05)
    tail = log.read_text()[-2000:] if log.exists() else ""
    raise TrainingError(f"The fork server did not start within {wait_s:.0f} s.\n{tail}", value=str(path))


def main() -> None:
    """``python -m training.agent serve|start --socket PATH``: be the fork server, or start it and return."""
    parser = argparse.ArgumentParser(prog="python -m training.agent", description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["serve", "start"])
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--idle-s", type=float, default=None, help="leave after this long without a request")
    arguments = parser.parse_args()
    if arguments.mode == "serve":
        from training.fork_server import serve

        serve(arguments.socket, arguments.idle_s)
        return
    command = [sys.executable, "-m", "training.agent", "serve", "--socket", str(arguments.socket)]
    if arguments.idle_s is not None:
        command += ["--idle-s", str(arguments.idle_s)]
    with arguments.socket.with_suffix(".log").open("ab") as log:
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


if __name__ == "__main__":
    main()
