"""The fork server and the keeper of each training process. Imports neither Ray nor torch before it serves.

The fork server imports torch, DeepSpeed, diffusers and MLflow once; a training process forked from it starts in
milliseconds. For each connection it forks a *keeper*, which forks the training process, reports how it ended
and ends it when the agent (``training.agent``) goes away. Requests and events are JSON lines; nothing is
unpickled, and the only thing that a request can run is ``training.worker``.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.agent import KILL, accelerator

PRELOAD = (
    "training.worker",
    # DeepSpeed imports it in `initialize`, and it drags in torch._dynamo: 1.9 s
    "deepspeed.runtime.zero.muon.muon_optimizer",
    # the same, for layers that it looks for in every network: 0.2 s
    "deepspeed.module_inject.auto_ep_layer",
    "diffusers.models.unets.unet_2d_condition",
    "schedulefree",
    "mlflow.tracking.client",
    "mlflow.system_metrics.system_metrics_monitor",
)
GRACE_S = 60.0
"""How long an abandoned training process may take to checkpoint and leave."""


def serve(path: Path, idle_s: float | None) -> None:
    """Be the fork server until SIGTERM, or until nobody has asked for ``idle_s``."""
    _keep_freed_memory()
    _spare_gpus()
    _preload()
    # Collecting garbage writes to every object that it looks at: a forked process would copy their pages, one by one,
    # in the middle of its start. With this and the preloads, fork to first step took 0.63 s of CPU instead of 1.27.
    gc.collect()
    gc.freeze()
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


def _preload() -> None:
    """Whatever a training process would import or work out before its first step, whoever asks for it."""
    for name in PRELOAD:
        importlib.import_module(name)
    from PIL import Image

    Image.init()  # the readers of less common formats: 0.1 s


def _spare_gpus() -> None:
    """Settle what forked processes compute on, without a touch of CUDA: a context does not survive a fork.

    Nor may the first agent's GPUs be those of all: the server sees every one, and each process what its agent sees.
    """
    os.environ["DS_ACCELERATOR"] = accelerator(os.environ)
    if os.environ["DS_ACCELERATOR"] == "cuda":
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    # torch.cuda.is_available(), which libraries ask when they are imported, asks the driver then and not CUDA
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"


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
        request, wish = _read_request(connection)
        # blocked until training.worker has settled what it means: before, it would kill instead of stop
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        child = os.fork()
        if child == 0:
            _train(connection, request)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        if wish:
            os.kill(child, _meant(wish))
        status = _watch(child, connection)
        end = {"event": "exit", "code": os.waitstatus_to_exitcode(status)}
        connection.sendall(json.dumps(end).encode() + b"\n")
        code = 0
    except BrokenPipeError:
        code = 0  # the agent has gone; there is nobody to tell
    finally:
        os._exit(code)


def _meant(wish: bytes) -> signal.Signals:
    """The signal for what an agent wishes; one that is gone wishes for nothing, and so for an orderly end."""
    return signal.SIGKILL if KILL.strip() in wish else signal.SIGTERM


def _read_request(connection: socket.socket) -> tuple[Mapping[str, Any], bytes]:
    """The request, and what came right after it."""
    received = b""
    while b"\n" not in received:
        part = connection.recv(65536)
        if not part:
            break
        received += part
    line, _, rest = received.partition(b"\n")
    return json.loads(line), rest


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
        os.kill(child, _meant(message))


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
