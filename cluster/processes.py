"""Background processes of ours: started in a session of their own, found again, and stopped without touching others.

A process is known by its pid *and* its start time, because the kernel hands pids out again. What it started is
known by a mark in the environment, because daemons leave their parents and rename themselves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

from training.errors import StackError, UsageError

MARK = "DARKROOM_PROCESS"
"""The environment variable that says which stack and component a process belongs to."""

_PORTS = range(20_000, 32_000)
"""Below Linux's range for outgoing connections, so that none of those takes a port between our look and our start."""


class ProcessRecord(BaseModel):
    """A process that we started, as ``stack.json`` remembers it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pid: int
    """The process, and the leader of its session."""
    created_s: float
    """Its start, in seconds since the epoch."""

    def find(self) -> psutil.Process | None:
        """The process, if it still is the one that we started."""
        try:
            process = psutil.Process(self.pid)
            alive = process.status() != psutil.STATUS_ZOMBIE
            # the kernel counts from boot; a clock that was set since then moves the sum a little
            return process if alive and abs(process.create_time() - self.created_s) < 2 else None
        except psutil.NoSuchProcess:
            return None


def start(argv: Sequence[str], *, mark: str, environment: Mapping[str, str], log: Path) -> ProcessRecord:
    """Start a process that outlives us, with its output appended to ``log``.

    Args:
        argv: the command; no shell is involved.
        mark: what ``MARK`` is set to, for the process and all its descendants.
        environment: the whole environment.
        log: parent directories are made.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        child = subprocess.Popen(  # in a session of its own: our Ctrl-C is not its Ctrl-C
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment, MARK: mark},
            start_new_session=True,
        )
    child.returncode = 0  # unknown, but Popen warns when it is collected before its process ends; ours outlive us
    return ProcessRecord(pid=child.pid, created_s=psutil.Process(child.pid).create_time())


def family(record: ProcessRecord | None, mark: str) -> list[psutil.Process]:
    """The recorded process, its descendants, its session, and every process of ours that carries ``mark``.

    A mark's first part, the stack's, stands for the marks of all its components.
    """
    leader = record.find() if record else None
    found: dict[int, psutil.Process] = {}
    if leader:
        with contextlib.suppress(psutil.NoSuchProcess):
            found = {process.pid: process for process in (leader, *leader.children(recursive=True))}
    user = os.getuid()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if process.pid == os.getpid() or process.uids().real != user:
                continue
            in_session = leader is not None and os.getsid(process.pid) == leader.pid
            if in_session or f"{process.environ().get(MARK)}/".startswith(f"{mark}/"):
                found[process.pid] = process
    return list(found.values())


def stop(record: ProcessRecord | None, mark: str, *, grace_s: float) -> int:
    """End a process and everything that it started; how many there were.

    The leader is asked first, so that it can end its own children in order; who is left after ``grace_s`` is killed.
    """
    members = family(record, mark)
    leader = record.find() if record else None
    if leader:
        _signal([leader], signal.SIGTERM)
        psutil.wait_procs([leader], timeout=grace_s)
    members = list({process.pid: process for process in (*members, *family(record, mark))}.values())
    _signal(members, signal.SIGTERM)
    _, left = psutil.wait_procs(members, timeout=2)
    _signal(left, signal.SIGKILL)
    psutil.wait_procs(left, timeout=5)
    return len(members)


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)  # psutil refuses when the pid is somebody else's by now


def free_ports(count: int) -> list[int]:
    """``count`` different TCP ports on which nobody listens now."""
    start_at = time.time_ns() % len(_PORTS)
    found: list[int] = []
    for offset in range(len(_PORTS)):
        port = _PORTS[(start_at + offset) % len(_PORTS)]
        if not port_taken(port):
            found.append(port)
        if len(found) == count:
            return found
    raise StackError("No free TCP ports are left.", rule=f"{count} ports in {_PORTS.start}-{_PORTS.stop - 1}")


def port_taken(port: int) -> bool:
    """Whether somebody listens on ``port``, on whichever address."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))  # noqa: S104 - never listened on
        except OSError:
            return True
    return False


def require_free(port: int, option: str) -> None:
    """Refuse a port that is in use.

    Raises:
        UsageError: it names the port, who has it where that can be seen, and a free one.
    """
    if not 1024 <= port <= 65535:
        raise UsageError(f"{option} is not a port that you can use.", value=port, rule="1024 <= port <= 65535")
    if port_taken(port):
        raise UsageError(
            f"The port for {option} is in use by {listener(port)}.",
            value=port,
            rule="nobody else listens on it",
            options=(f"{option} {free_ports(1)[0]}", f"no {option}: a free one is chosen"),
        )


def listener(port: int) -> str:
    """Who listens on ``port``, for a message."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return "another process"


def tail(log: Path, lines: int = 12) -> str:
    """The last lines of a log."""
    if not log.exists():
        return ""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def wait_until(check: Callable[[], bool], deadline_s: float, every_s: float = 0.2) -> bool:
    """Poll ``check`` until it holds; whether it did before the deadline."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if check():
            return True
        time.sleep(every_s)
    return check()
