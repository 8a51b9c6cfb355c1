"""The fork server, the training process forked from it, and its supervision. Imports neither Ray nor torch.

    agent (a Ray worker) --unix socket--> fork server --fork--> keeper --fork--> training process

The fork server imports torch, DeepSpeed, diffusers and MLflow once; a training process forked from it starts in
milliseconds. For each connection it forks a *keeper*, which forks the training process, reports how it ended
and ends it when the agent goes away. Requests and events are JSON lines; nothing is unpickled, and the only
thing that a request can run is ``training.worker``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from training.errors import TrainingError

PRELOAD = (
    "training.worker",
    # DeepSpeed imports it in `initialize`, and it drags in torch._dynamo: 1.9 s
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "diffusers.models.unets.unet_2d_condition",
    "mlflow.tracking.client",
    "mlflow.system_metrics.system_metrics_monitor",
)
GRACE_S = 60.0
"""How long an abandoned training process may take to checkpoint and leave."""


def socket_path(cluster: str) -> Path:
    """Where the fork server of this code, on this node, for one cluster, listens.

    Args:
        cluster: names the cluster, e.g. its GCS address, so that two stacks on one machine share nothing.
    """
    code = hashlib.sha256(f"{sys.executable} {cluster}".encode())
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
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def events(self) -> Iterator[dict[str, Any]]:
        """What the process reports, in order; the last is ``{"event": "exit", "code": ..., "signal": ...}``."""
        with self._connection.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)

    def stop(self) -> None:
        """Ask it to checkpoint and leave."""
        self._connection.sendall(b'{"stop": true}\n')

    def close(self) -> None:
        """Let go: a process that still runs is asked to checkpoint and leave, and killed after a while."""
        with contextlib.suppress(OSError):  # the keeper may have gone first
            self._connection.shutdown(socket.SHUT_RDWR)  # closing alone waits for whoever still reads events
        self._connection.close()


def launch(path: Path, task: Literal["train", "publish"], spec: Mapping[str, Any], log: Path) -> TrainingProcess:
    """Fork a training process, starting the fork server first where there is none.

    Args:
        path: the fork server's socket.
        task: which part of ``training.worker`` runs.
        spec: what it is told; JSON.
        log: file that gets the process's output.

    Raises:
        TrainingError: the fork server does not start.
    """
    connection = _connect(path) or _start_server(path)
    request = {
        "task": task,
        "spec": dict(spec),
        "environment": dict(os.environ),
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


def _start_server(path: Path, wait_s: float = 180.0) -> socket.socket:
    """Start the server as a daemon, once per node however many agents ask at the same time."""
    log = path.with_suffix(".log")
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        connection = _connect(path)
        if connection:
            return connection
        # In a session of its own and orphaned at once: Ray ends the children of a worker with the worker.
        command = [sys.executable, "-m", "training.agent", "start", "--socket", str(path), "--idle-s", "900"]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            connection = _connect(path)
            if connection:
                return connection
            time.sleep(0.05)
    tail = log.read_text()[-2000:] if log.exists() else ""
    raise TrainingError(f"The fork server did not start within {wait_s:.0f} s.\n{tail}", value=str(path))


def serve(path: Path, idle_s: float | None) -> None:
    """Be the fork server until SIGTERM, or until nobody has asked for ``idle_s``."""
    _keep_freed_memory()
    for name in PRELOAD:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are reaped by the kernel
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(path))
        server.listen(64)
        server.settimeout(idle_s)
        try:
            while True:
                connection, _ = server.accept()
                if os.fork() == 0:
                    server.close()
                    _keep(connection)
                connection.close()
        except TimeoutError:
            return
        finally:
            path.unlink(missing_ok=True)


def _keep_freed_memory() -> None:
    """Let malloc keep large blocks for the next step instead of returning them to the kernel.

    Training on a CPU allocates the same activations at every step; faulting their pages in anew took a tenth of
    the time (118 against 125 images/s for the 32 px UNet on two cores). Forked processes inherit the setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None:
        trim_threshold, mmap_threshold, top_pad = -1, -3, -2
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**26)


def _keep(connection: socket.socket) -> None:
    """The keeper: fork the training process, watch it and the agent, report the end. Never returns."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with connection.makefile("r", encoding="utf-8") as lines:
            request = json.loads(lines.readline())
            child = os.fork()
            if child == 0:
                _train(connection, request)
            status = _watch(child, connection)
        end = {"event": "exit", "code": os.waitstatus_to_exitcode(status)}
        connection.sendall(json.dumps(end).encode() + b"\n")
        code = 0
    except BrokenPipeError:
        code = 0  # the agent has gone; there is nobody to tell
    finally:
        os._exit(code)


def _watch(child: int, connection: socket.socket) -> int:
    """Wait for the training process; end it when the agent asks or goes away. Returns the wait status."""
    process = os.pidfd_open(child)
    abandoned: float | None = None
    watched = [process, connection.fileno()]
    while True:
        timeout = None if abandoned is None else max(0.0, abandoned + GRACE_S - time.monotonic())
        ready, _, _ = select.select(watched, [], [], timeout)
        if process in ready:
            return os.waitpid(child, 0)[1]
        if not ready:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]
        try:
            message = connection.recv(65536)
        except ConnectionResetError:
            message = b""
        if not message:
            watched.remove(connection.fileno())
            abandoned = time.monotonic()
        os.kill(child, signal.SIGTERM)


def _train(connection: socket.socket, request: Mapping[str, Any]) -> None:
    """The training process. Never returns."""
    code = 1
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the keeper
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        worker = importlib.import_module("training.worker")

        def emit(event: Mapping[str, Any]) -> None:
            try:
                connection.sendall(json.dumps(event).encode() + b"\n")
            except BrokenPipeError:  # the agent is gone and the keeper's SIGTERM on its way: reach the checkpoint
                sys.stderr.write(f"the agent has gone; event dropped: {json.dumps(event)}\n")

        code = worker.main(request["task"], request["spec"], emit)
    except BaseException:  # noqa: BLE001  the process ends here; whatever it was belongs in its log
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """``python -m training.agent serve|start --socket PATH``: be the fork server, or start it and return."""
    parser = argparse.ArgumentParser(prog="python -m training.agent", description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["serve", "start"])
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--idle-s", type=float, default=None, help="leave after this long without a request")
    arguments = parser.parse_args()
    if arguments.mode == "serve":
        serve(arguments.socket, arguments.idle_s)
        return
    command = [sys.executable, "-m", "training.agent", "serve", "--socket", str(arguments.socket)]
    if arguments.idle_s is not None:
        command += ["--idle-s", str(arguments.idle_s)]
    with arguments.socket.with_suffix(".log").open("ab") as log:
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


if __name__ == "__main__":
    main()
