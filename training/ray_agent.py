"""What runs on the cluster's nodes: Ray workers that fork the real work and relay what it tells.

They import no torch; the training process is forked from the node's warm fork server (``training.agent``).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train

from training import agent, checkpoint
from training.errors import TrainingError

FLUSH_S = 0.25
"""How often an agent tells the driver of steps."""

ENTERED = "Ray Train worker entered"
"""The mark that begins each attempt of a worker group."""

Events = list[dict[str, Any]]


@ray.remote(num_cpus=0)
class Mailbox:
    """Carries events from agents to the driver, and the wish to stop the other way."""

    def __init__(self) -> None:
        self._events: Events = []
        self._stop = False
        self._errors: dict[str, dict[str, Any]] = {}

    def put(self, events: Events) -> bool:
        """Take events; True asks the sender to stop its training process."""
        self._events.extend(events)
        for event in events:
            if event["event"] == "error":
                self._errors[event["label"]] = cause(self._errors.get(event["label"]), event)
        return self._stop

    def reason(self, label: str) -> str:
        """Why a run's last attempt failed; empty where no error was told."""
        return str(self._errors[label]["message"]) if label in self._errors else ""

    def drain(self) -> Events:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def stop(self) -> None:
        """Ask every agent to stop."""
        self._stop = True

    def stopping(self) -> bool:
        """Whether agents are asked to stop."""
        return self._stop


def cause(known: dict[str, Any] | None, told: dict[str, Any]) -> dict[str, Any]:
    """Which of two errors of a run explains its end.

    That of the later attempt, for earlier ones were mended; then a typed one; then the first, for when one rank
    fails, the others lose their connection to it and say so too.
    """

    def rank(event: Mapping[str, Any]) -> tuple[float, bool, float]:
        return -event["attempt"], not event.get("typed"), event["time_s"]

    return told if known is None or rank(told) < rank(known) else known


def agent_loop(settings: dict[str, Any]) -> None:
    """What a Ray Train worker runs: fork, relay, and fail where the training process failed."""
    from ray.train.collective import broadcast_from_rank_zero

    context = ray.train.get_context()
    rank = context.get_world_rank()
    entered = {"event": "mark", "name": ENTERED, "time_s": time.time()}
    attempt = broadcast_from_rank_zero(_begin(settings["mailbox"]) if rank == 0 else None)
    tell = Teller(settings["mailbox"], settings["label"], attempt["number"], first=rank == 0)
    tell.take(entered)
    if attempt["stop"]:  # all workers heard the same, so none waits for another's process
        tell.take(_stopped(settings))
        tell.flush()
        return
    spec = {
        **{key: settings[key] for key in ("config", "run_dir", "tracking_uri", "tags", "parent_run_id")},
        "rank": rank,
        "local_rank": context.get_local_rank(),
        "world": context.get_world_size(),
        "address": attempt["address"],
        "port": attempt["port"],
    }
    log = Path(settings["run_dir"]) / "logs" / f"rank-{rank}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = _environment(settings["config"])
    process = agent.launch(_fork_server(environment), "train", spec, log, environment)
    relay = Relay(tell, process)
    try:
        code = relay.run()
    finally:
        process.close()
    if code and not tell.error:
        if tell.stopping:  # it had not come far enough to leave in order
            tell.take(_stopped(settings))
        else:
            message = f"The training process of rank {rank} ended with {code}; its log is {log}"
            tell.take({"event": "error", "message": message, "time_s": relay.ended_s})
    tell.flush()
    # neither a typed error nor a run that is to stop is tried again
    if code and not tell.stopping and not (tell.error and tell.error.get("typed")):
        raise TrainingError(f"The training process of rank {rank} ended with {code}.", mend=f"its log is {log}")


def _begin(mailbox: Any) -> dict[str, Any]:
    """What rank 0 decides for all workers of an attempt: where they meet, or that there is nothing to begin."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    stop = ray.get(mailbox.stopping.remote())
    return {"address": ray.util.get_node_ip_address(), "port": port, "number": time.time(), "stop": stop}


def _stopped(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The end of a run that was asked to leave before its process could tell."""
    found, _ = checkpoint.newest(Path(settings["run_dir"]) / "checkpoints")
    return {"event": "done", "step": found.step if found else 0, "stopped": True}


def publish_task(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The Ray task that measures and registers a run; yields its events."""
    log = Path(spec["run_dir"]) / "logs" / "publish.log"
    environment = _environment(spec["config"])
    process = agent.launch(_fork_server(environment), "publish", spec, log, environment)
    try:
        yield from process.events()
    finally:
        process.close()


def _fork_server(environment: Mapping[str, str]) -> Path:
    """This node's; a cluster is told from others on the machine by its port."""
    return agent.socket_path(ray.get_runtime_context().gcs_address.rsplit(":", 1)[-1], environment)


def _environment(config: Mapping[str, Any]) -> Mapping[str, str]:
    """The training process's: without GPUs where the recipe asks for none, for Ray hides them from nobody."""
    return os.environ if config["workers"]["gpus"] else {**os.environ, "DS_ACCELERATOR": "cpu"}


class Teller:
    """Tells the driver what happens in one worker, and learns whether it is to stop.

    Args:
        mailbox: takes the events.
        label: goes into each, so that trials can be told apart.
        attempt: goes into each; a later attempt has a greater number.
        first: of rank 0, which speaks for all; of the others, only errors and warnings count.

    Attributes:
        stopping: whether the run is to stop.
        error: the first error told.
    """

    def __init__(self, mailbox: Any, label: str, attempt: float, *, first: bool) -> None:
        self.mailbox, self.label, self.attempt, self.first = mailbox, label, attempt, first
        self.stopping = False
        self.error: dict[str, Any] | None = None
        self._pending: Events = []
        self._flushed_s = 0.0

    def take(self, event: dict[str, Any]) -> None:
        """Keep what counts, and pass it on now and then; errors at once."""
        if event["event"] == "error":
            self.error = self.error or event
        if self.first or event["event"] in ("error", "warning"):
            self._pending.append({**event, "label": self.label, "attempt": self.attempt})
        if event["event"] == "error" or time.monotonic() - self._flushed_s > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Tell the driver; hear whether to stop."""
        self._flushed_s = time.monotonic()
        events, self._pending = self._pending, []
        self.stopping = ray.get(self.mailbox.put.remote(events))


class Relay:
    """Passes a training process's events on, evaluations to Ray Train too; and the wish to stop the other way.

    Attributes:
        ended_s: when the process had ended.
    """

    def __init__(self, tell: Teller, process: agent.TrainingProcess) -> None:
        self.tell, self.process = tell, process
        self.ended_s = 0.0

    def run(self) -> int:
        """Until the process has ended; returns its exit code, negative for a signal."""
        asked = False
        # rank 0's process hears of the wish to stop even while it has nothing to tell, and shares it with the others
        for event in self.process.events(FLUSH_S if self.tell.first else None):
            if event["event"] == "exit":
                self.ended_s = time.time()
                return int(event["code"])
            if event["event"] == "idle":
                self.tell.flush()
            else:
                if event["event"] == "evaluation":
                    ray.train.report({"training_step": event["step"], **event["metrics"]})
                self.tell.take(event)
            if self.tell.stopping and not asked:
                asked = True
                self.process.stop()
        self.ended_s = time.time()
        return 1  # its keeper was killed, and it with the keeper
