"""Notices that a node of the worker group is about to be taken away, as clouds give for their cheaper machines."""

from __future__ import annotations

import time
from collections.abc import Callable

LEAVES_BEFORE_S = 30.0
"""How long before the node goes the training processes are asked to checkpoint and leave."""

TOLD = "A node is about to be taken away: saving a checkpoint. The run goes on with a new worker group."


def due() -> bool:
    """Whether this worker's training process is to checkpoint and leave now.

    It reads what Ray Train's watcher of drained nodes has told this worker. ``ray.train.get_preemption_info`` reads the
    same, but makes every rank wait for all others, as reports do, and they would wait for one another.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    notice = get_train_context().preemption_context.preemption_info
    if notice is None:
        return False
    return notice.deadline_ms is None or time.time() > notice.deadline_ms / 1000 - LEAVES_BEFORE_S


def await_end(stopping: Callable[[], bool]) -> None:
    """Wait for Ray Train to end this worker, which it does when the node's time is over; then it starts a new group.

    A worker that returned would end the run, and one that raised would count as a failure.

    Args:
        stopping: whether the run is to stop; then this returns.
    """
    while not stopping():
        time.sleep(1.0)
