"""What the fork server forks: the one entry that a request can run."""

from __future__ import annotations

import logging
import signal
import time
import traceback
from collections.abc import Mapping
from typing import Any

from training import forecast_task, publish
from training.errors import DarkroomError, UsageError
from training.run import Run
from training.self_tests import process as self_test
from training.self_tests.spec import SelfTestSpec
from training.spec import Emit, WorkerSpec, mark


def main(task: str, spec: Mapping[str, Any], emit: Emit) -> int:
    """Run one rank, or publish a run; returns the exit code.

    Every failure is told through ``emit`` and in the log. SIGTERM is blocked at first, so that none comes too early:
    a run unblocks it when it can leave in order, and publishing, which has nothing to save, just ends.

    Args:
        task: ``"train"``, ``"publish"``, ``"forecast"`` or ``"self_test"``.
        spec: a ``WorkerSpec``, a ``publish.PublishSpec``, what ``forecast_task`` wants or a ``SelfTestSpec``, as a
            mapping.
        emit: takes events.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    emit(mark("process forked"))
    try:
        if task == "publish":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            publish.main(spec, emit)
        elif task == "forecast":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            forecast_task.main(spec, emit)
        elif task == "self_test":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            self_test.main(SelfTestSpec(**spec), emit)
        elif task == "train":
            Run(WorkerSpec(**spec), emit).train()
        else:
            raise UsageError(
                "There is no such task.",
                value=task,
                rule="one of the tasks",
                options=["train", "publish", "forecast", "self_test"],
            )
    except DarkroomError as error:
        traceback.print_exc()
        told = {"typed": True, "exit_code": error.exit_code, "message": error.as_text()}
        emit({"event": "error", "time_s": time.time(), **told})
        return error.exit_code
    except Exception as error:  # noqa: BLE001  the boundary: told, logged, and the exit code says so
        traceback.print_exc()
        emit({"event": "error", "time_s": time.time(), "message": f"{type(error).__name__}: {error}"})
        return 1
    return 0
