"""What an agent passes on: events to the driver, evaluations to Ray Train, and the wish to stop the other way."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping
from typing import Any

import ray
import ray.train

from training import agent, ray_preemption
from training.supervision import Verdict

FLUSH_S = 0.5
"""How often an agent tells the driver of steps."""

Events = list[dict[str, Any]]


class Teller:
    """Tells the driver what happens in one worker, and learns whether it is to stop.

    Args:
        mailbox: takes the events.
        label: goes into each, so that trials can be told apart.
        attempt: goes into each; a later attempt has a greater number.
        first: of rank 0, which speaks for all; of the others, only errors and warnings count.

    Attributes:
        stopping: whether the run is to stop.
    """

    def __init__(self, mailbox: Any, label: str, attempt: float, *, first: bool) -> None:
        self.mailbox, self.label, self.attempt, self.first = mailbox, label, attempt, first
        self.stopping = False
        self._pending: Events = []
        self._flushed_s = 0.0

    def take(self, event: dict[str, Any]) -> None:
        """Keep what counts, and pass it on now and then; errors at once."""
        if self.first or event["event"] in ("error", "warning"):
            self._pending.append({**event, "label": self.label, "attempt": self.attempt})
        if event["event"] == "error" or time.monotonic() - self._flushed_s > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Tell the driver; hear whether to stop."""
        self._flushed_s = time.monotonic()
        events, self._pending = self._pending, []
        self.stopping = ray.get(self.mailbox.put.remote(events))


class Reporter:
    """Reports evaluations to Ray Train, for which all ranks must come together, from a thread of its own.

    A rank that waits for another one there could not hear that its process has ended. Each step is reported once, also
    where it was done again, so that all ranks report equally often.
    """

    def __init__(self) -> None:
        self._step = 0
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)
        self._thread.start()

    def take(self, event: Mapping[str, Any]) -> None:
        """An ``evaluation``."""
        if event["step"] > self._step:
            self._step = event["step"]
            self._queue.put({"training_step": event["step"], **event["metrics"]})

    def close(self) -> None:
        """Wait until everything has been reported."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (metrics := self._queue.get()) is not None:
            ray.train.report(metrics)


class Relay:
    """Passes a training process's events on, evaluations to Ray Train too; and the wish to stop the other way.

    Args:
        tell: takes the events.
        report: takes evaluations.
        meeting: why this process was forked.

    Attributes:
        step: the last that was told.
        error: by which the process said why it failed. It is kept here: the verdict of all ranks tells what counts.
        done: by which it said that it left in order. It is kept here as well: where another rank's agent was lost, the
            run is not at its end.
    """

    def __init__(self, tell: Teller, report: Reporter, meeting: Verdict) -> None:
        self.tell, self.report, self._recovering = tell, report, meeting
        self.step = 0
        self.error: dict[str, Any] | None = None
        self.done: dict[str, Any] | None = None

    def run(self, process: agent.TrainingProcess) -> int:
        """Until the process has ended; returns its exit code, negative for a signal."""
        asked = False
        # rank 0's process hears of the wish to stop even while it has nothing to tell, and shares it with the others
        for event in process.events(FLUSH_S if self.tell.first else None):
            if event["event"] == "exit":
                return int(event["code"])
            if event["event"] == "idle":
                self.tell.flush()
            elif event["event"] == "error":
                self.error = self.error or event
            elif event["event"] == "done":
                self.done = event
            else:
                self._take(event)
            if not asked and (self.tell.stopping or ray_preemption.due()):
                asked = True
                if self.tell.first and not self.tell.stopping:
                    self.tell.take({"event": "warning", "message": ray_preemption.TOLD})
                process.stop()
        return 1  # its keeper was killed, and it with the keeper

    def _take(self, event: dict[str, Any]) -> None:
        if event["event"] == "evaluation":
            self.report.take(event)
        elif event["event"] == "step":
            self.step = event["step"]
            event = {**event, "time_s": time.time()}
        self.tell.take(event)
        resumed = event["event"] == "resumed"
        if self._recovering.what and (resumed or event["event"] == "step") and self.tell.first:
            came = f"going on from step {event['step']}" if resumed else "beginning anew"
            seconds = time.time() - self._recovering.since_s
            message = f"{self._recovering.what}; {came} after {seconds:.1f} s"
            self.tell.take({"event": "warning", "message": message})
            self._recovering = Verdict("again")
