"""A process of our own that does jobs, one after the other, and leaves with the process that started it.

``multiprocessing`` would run the caller's main module again in each of its processes, does not say which job killed
one, and leaves them behind when the caller is killed.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import IO, Any

_HEADER = struct.Struct("<Q")


class WorkerDiedError(Exception):
    """The process ended in the middle of a job."""


class JobWorker:
    """The handle of one process, started at its first job, and anew where a job killed it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._lock = threading.Lock()

    def do(self, work: Callable[[Any], Any], job: Any) -> Any:
        """``attempt(work, job)`` over there.

        Raises:
            WorkerDiedError: the process died.
            Exception: what ``attempt`` raises.
        """
        process = self._started()
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("a worker's pipes are missing")
        try:
            _send(process.stdin, pickle.dumps(work))
            _send(process.stdin, pickle.dumps(job))
            outcome = _receive(process.stdout)
        except BrokenPipeError:
            outcome = None
        if outcome is None:
            code = self._end()
            raise WorkerDiedError(f"the process that did it died ({_ending(code)})")
        found = pickle.loads(outcome)  # noqa: S301 - from our own process
        if isinstance(found, BaseException):
            raise found
        return found

    def close(self) -> None:
        """End the process at once: what it was doing is lost."""
        with self._lock:
            self._closed = True
        self._end()

    def _started(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed:
                raise RuntimeError("the worker is closed")
            if self._process is None:
                path = os.pathsep.join(entry for entry in sys.path if entry)
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "training.data.job_worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    process_group=0,  # Ctrl-C at a terminal is for the process that started this one
                    env={**os.environ, "PYTHONPATH": path},
                )
            return self._process

    def _end(self) -> int:
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return 0
        process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # of what was not sent any more
                    pipe.close()
        return code


def _ending(code: int) -> str:
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        return f"signal {-code}"


def _send(file: IO[bytes], data: bytes) -> None:
    file.write(_HEADER.pack(len(data)) + data)
    file.flush()


def _receive(file: IO[bytes]) -> bytes | None:
    """The next message; None where the other side has ended."""
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    (size,) = _HEADER.unpack(header)
    data = file.read(size)
    return data if len(data) == size else None


def _listen(messages: queue.SimpleQueue[bytes]) -> None:
    """Take what comes; without the process that sends it, this one is of no use."""
    while (data := _receive(sys.stdin.buffer)) is not None:
        messages.put(data)
    os._exit(0)


def main() -> None:
    """Do jobs until the process that sends them ends."""
    from training.data.executor import attempt
    from training.errors import DarkroomError

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints, prints no answer
    messages = queue.SimpleQueue[bytes]()
    threading.Thread(target=_listen, args=(messages,), name="listen", daemon=True).start()
    known: bytes = b""
    work: Any = None
    outcome: object
    while True:
        said = messages.get()
        if said != known:
            known, work = said, pickle.loads(said)  # noqa: S301 - from the process that started this one
        job = pickle.loads(messages.get())  # noqa: S301 - as above
        try:
            outcome = attempt(work, job)
        except (DarkroomError, OSError) as error:
            outcome = error
        _send(answers, pickle.dumps(outcome))


if __name__ == "__main__":
    main()
