"""One writer per run: the lock that rank 0's training process holds for as long as it lives."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from training.errors import TrainingError
from training.fork_server import GRACE_S

NAME = "lock"
NFS_LEASE_S = 90.0
"""After so long, NFS version 4 takes the locks of a node that is gone."""
WAIT_S = max(GRACE_S, NFS_LEASE_S) + 15.0
"""A process that lost its agent leaves within ``GRACE_S``; the rest is for a busy machine."""
_LOOK_S = 0.1


def hold(
    run_dir: Path, *, on_wait: Callable[[str], None], give_up: Callable[[], bool], wait_s: float = WAIT_S
) -> int | None:
    """Take the run's lock, after its holder where there is one.

    A predecessor that lost its agent still writes its last checkpoint: reading or writing beside it would mix two
    histories of one run. The kernel frees the lock when its holder ends, however that happens.

    Args:
        run_dir: the run's folder.
        on_wait: is told once for whom this waits.
        give_up: asked while waiting; True ends the wait.
        wait_s: how long to wait.

    Returns:
        The lock's file descriptor, to be left open until the process ends; None after ``give_up``.

    Raises:
        TrainingError: another process keeps the lock, or the storage has no locks.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / NAME
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    deadline: float | None = None
    while not _locked(handle, path):
        if deadline is None:
            deadline = time.monotonic() + wait_s
            on_wait(f"Waiting up to {wait_s:.0f} s for {_holder(path)}, which still works on this run.")
        if give_up() or time.monotonic() > deadline:
            os.close(handle)
            if give_up():
                return None
            raise TrainingError(
                "Another process trains this run.",
                value=str(path),
                rule=f"one training at a time; the lock is held by {_holder(path)}",
                mend="wait for that run or stop it, or give this one another name with --set name=...",
            )
        time.sleep(_LOOK_S)
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
    return handle


def _locked(handle: int, path: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        os.close(handle)
        raise TrainingError(
            "The run's folder cannot be locked.",
            value=str(path),
            rule=f"storage with file locks; this one says {error.strerror}",
            mend="put the runs on a file system that has them, e.g. NFS version 4",
        ) from error
    return True


def _holder(path: Path) -> str:
    try:
        written = json.loads(path.read_text())
        return f"process {written['pid']} on {written['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has not said its name yet"
