"""What runs on the cluster's nodes: Ray workers that fork the real work and relay what it tells.

They import no torch; the training process is forked from the node's warm fork server (``training.agent``).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train

from training import agent
from training.errors import TrainingError

FLUSH_S = 0.25
"""How often an agent tells the driver of steps."""

Events = list[dict[str, Any]]


@ray.remote(num_cpus=0)
class Mailbox:
    """Carries events from agents to the driver, and the wish to stop the other way."""

    def __init__(self) -> None:
        self._events: Events = []
        self._stop = False
        self._reasons: dict[str, str] = {}

    def put(self, events: Events) -> bool:
        """Take events; True asks the sender to stop its training process."""
        self._events.extend(events)
        self._reasons |= {event["label"]: event["message"] for event in events if event["event"] == "error"}
        return self._stop

    def reason(self, label: str) -> str:
        """The last error that a run told of; empty for none."""
        return self._reasons.get(label, "")

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


def agent_loop(settings: dict[str, Any]) -> None:
    """What a Ray Train worker runs: fork, relay, and fail where the training process failed."""
    from ray.train.collective import broadcast_from_rank_zero

    context = ray.train.get_context()
    rank = context.get_world_rank()
    entered = {"event": "mark", "name": "Ray Train worker entered", "time_s": time.time()}
    where = broadcast_from_rank_zero(_free_address() if rank == 0 else None)
    spec = {
        **{key: settings[key] for key in ("config", "run_dir", "tracking_uri", "tags", "parent_run_id")},
        "rank": rank,
        "local_rank": context.get_local_rank(),
        "world": context.get_world_size(),
        "address": where["address"],
        "port": where["port"],
    }
    log = Path(settings["run_dir"]) / "logs" / f"rank-{rank}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    process = agent.launch(_fork_server(), "train", spec, log)
    relay = Relay(settings["mailbox"], process, settings["label"], first=rank == 0)
    relay.take(entered)
    try:
        code = relay.run()
    finally:
        process.close()
    if code and not relay.typed:
        raise TrainingError(f"The training process of rank {rank} ended with {code}.", mend=f"its log is {log}")


def publish_task(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The Ray task that measures and registers a run; yields its events."""
    log = Path(spec["run_dir"]) / "logs" / "publish.log"
    process = agent.launch(_fork_server(), "publish", spec, log)
    try:
        yield from process.events()
    finally:
        process.close()


def _fork_server() -> Path:
    """This node's; a cluster is told from others on the machine by its port."""
    return agent.socket_path(ray.get_runtime_context().gcs_address.rsplit(":", 1)[-1])


def _free_address() -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return {"address": ray.util.get_node_ip_address(), "port": probe.getsockname()[1]}


class Relay:
    """Passes a training process's events on: all to the driver, evaluations to Ray Train."""

    def __init__(self, mailbox: Any, process: agent.TrainingProcess, label: str, *, first: bool) -> None:
        self.mailbox, self.process, self.label, self.first = mailbox, process, label, first
        self.typed = False
        self._pending: Events = []
        self._flushed_s = 0.0
        self._stopping = False

    def run(self) -> int:
        """Until the process has ended; returns its exit code, negative for a signal."""
        code = 1
        for event in self.process.events():
            if event["event"] == "exit":
                code = int(event["code"])
                break
            if event["event"] == "evaluation":
                ray.train.report({"training_step": event["step"], **event["metrics"]})
            self.typed = self.typed or bool(event.get("typed"))
            self.take(event)
        self.flush()
        return code

    def take(self, event: dict[str, Any]) -> None:
        """Keep rank 0's events, and every rank's errors."""
        if self.first or event["event"] == "error":
            self._pending.append({**event, "label": self.label})
        if time.monotonic() - self._flushed_s > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Tell the driver; pass on its wish to stop."""
        self._flushed_s = time.monotonic()
        events, self._pending = self._pending, []
        if ray.get(self.mailbox.put.remote(events)) and not self._stopping:
            self._stopping = True
            self.process.stop()
