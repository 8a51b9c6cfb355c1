"""Programs of tests, forked from one process that has imported torch, DeepSpeed and diffusers for the whole session.

A program is a module of ``tests.training`` with a function ``main(words)``, which returns its exit code; its ranks are
forked once more, by ``together``. ``python -m tests.training.forked`` is that one process: it takes requests as JSON
lines, answers each with the program's exit code, and leaves when nobody can ask any more.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from training.fork_server import PRELOAD

LONGEST_S = 280.0
"""Of a program; then it hangs."""


class Warm:
    """Asks the process, which the first request starts."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, program: str, out: Path, *words: str) -> None:
        """Run ``main`` of ``tests.training.PROGRAM`` with ``out`` and the words; fails where the program does.

        Args:
            program: the module's name.
            out: the folder where it leaves what it has found; its output goes to ``out/output.log``.
            words: what it is told besides.
        """
        process = self._process = self._process or self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        request = {"program": program, "words": [str(out), *words], "log": str(out / "output.log")}
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], LONGEST_S)
        answer = process.stdout.readline() if ready else b""
        if not answer:
            self.end()
        assert answer, f"{program} {'hangs' if not ready else 'could not be started'}\n{_logs(out)}"
        assert json.loads(answer) == 0, f"{program} ended with {answer!r}\n{_logs(out)}"

    def end(self) -> None:
        """End the process, and whatever it has forked."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None

    @staticmethod
    def _started() -> subprocess.Popen[bytes]:
        root = Path(__file__).parents[2]
        # two ranks cannot share a GPU
        environment = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "tests.training.forked"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=root,
            env={**os.environ, **environment},
            start_new_session=True,  # so that all of it can be ended
        )


def together(world: int, act: Callable[..., None], *arguments: Any) -> list[int]:
    """Fork the ranks of a world from this process; returns their exit codes by rank.

    Args:
        world: how many.
        act: gets the rank, the world, a free port and the arguments.
        arguments: of all ranks.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=act, args=(rank, world, port, *arguments)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return [int(process.exitcode or 0) for process in ranks]


def _logs(out: Path) -> str:
    """The end of what a program and its ranks have said."""
    return "\n".join(f"{log}:\n{log.read_text(errors='replace')[-3000:]}" for log in sorted(out.rglob("*.log")))


def _run(request: Mapping[str, Any]) -> None:
    """The program. Never returns."""
    code = 1
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for handle, place in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(handle, place)
        code = importlib.import_module(f"tests.training.{request['program']}").main(request["words"])
    except BaseException:  # noqa: BLE001  the process ends here; whatever it was belongs in its log
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Serve until nobody can ask any more."""
    for name in PRELOAD:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # collecting garbage would copy the pages of all that was imported, in every process that is forked
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run(json.loads(line))
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
