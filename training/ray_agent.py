"""What runs on the cluster's nodes: Ray workers that fork the real work and relay what it tells.

They import no torch; the training process is forked from the node's warm fork server (``training.agent``).
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from training import agent, checkpoint, ray_preemption
from training.ray_relay import Events, Relay, Reporter, Teller
from training.supervision import End, Group, Supervision, Verdict

ENTERED = "Ray Train worker entered"
"""The mark that begins each attempt of a worker group."""


@ray.remote(num_cpus=0)
class Mailbox:
    """Carries events from agents to the driver, the wish to stop the other way, and verdicts between agents."""

    def __init__(self) -> None:
        self._events: Events = []
        self._stop = False
        self._errors: dict[str, dict[str, Any]] = {}
        self._supervised: dict[str, Supervision] = {}

    async def failure(self, group: Group, number: int) -> bool:
        """Wait until a process of the group's start ``number`` has failed; False when all have finished without."""
        return await self._supervision(group).failure(number)

    async def ended(self, group: Group, number: int, end: End) -> Verdict:
        """Take the end of a rank's process; what all ranks do when all have ended."""
        return await self._supervision(group).ended(number, end)

    def _supervision(self, group: Group) -> Supervision:
        known = self._supervised.get(group.label)
        if known is None or known.group.number < group.number:
            known = self._supervised[group.label] = Supervision(group, lambda: self._stop)
        # an agent of a group that Ray Train is about to end waits for that alone
        return known if known.group == group else Supervision(group, lambda: self._stop)

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


def open_mailbox() -> Any:
    """A mailbox on this driver's node, so that no other node takes it along when it is lost."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Mailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


def cause(known: dict[str, Any] | None, told: dict[str, Any]) -> dict[str, Any]:
    """Which of two errors of a run explains its end.

    That of the later attempt, for earlier ones were mended; then a typed one; then the first, for when one rank
    fails, the others lose their connection to it and say so too.
    """

    def rank(event: Mapping[str, Any]) -> tuple[float, bool, float]:
        return -event["attempt"], not event.get("typed"), event["time_s"]

    return told if known is None or rank(told) < rank(known) else known


def agent_loop(settings: dict[str, Any]) -> None:
    """What a Ray Train worker runs: fork, relay, and fork anew where a training process failed.

    It returns after an error that trying again cannot mend, which it has told; only what happens to agents and nodes
    is left to Ray Train.
    """
    from ray.train.collective import broadcast_from_rank_zero

    context = ray.train.get_context()
    rank, world, mailbox = context.get_world_rank(), context.get_world_size(), settings["mailbox"]
    entered = {"event": "mark", "name": ENTERED, "time_s": time.time(), "pid": os.getpid(), "world": world}
    attempt = broadcast_from_rank_zero(_begin(mailbox) if rank == 0 else None)
    tell = Teller(mailbox, settings["label"], attempt["number"], first=rank == 0)
    tell.take(entered)
    if attempt["stop"]:  # all workers heard the same, so none waits for another's process
        tell.take(_stopped(settings))
        tell.flush()
        return
    group = Group(settings["label"], attempt["number"], world, settings["config"]["workers"]["max_failures"])
    meeting, report, number = Verdict("again", address=attempt["address"], port=attempt["port"]), Reporter(), 0
    while meeting.kind == "again":
        spec = {
            **{key: settings[key] for key in ("config", "run_dir", "tracking_uri", "tags", "parent_run_id")},
            "rank": rank,
            "local_rank": context.get_local_rank(),
            "world": world,
            "address": meeting.address,
            "port": meeting.port,
        }
        relay = Relay(tell, report, meeting)
        end = _one_process(spec, relay, group, number)
        meeting = ray.get(mailbox.ended.remote(group, number, end))
        number += 1
    if meeting.kind == "finished" and relay.done:
        tell.take(relay.done)
    if rank == 0 and meeting.kind == "stopped":  # it had not come far enough to leave in order
        tell.take(_stopped(settings))
    if rank == 0 and meeting.error:
        tell.take(dict(meeting.error))
    tell.flush()
    left_early = meeting.kind == "finished" and relay.done is not None and relay.done["stopped"]
    if left_early and not tell.stopping and ray_preemption.due():
        ray_preemption.await_end(lambda: bool(ray.get(mailbox.stopping.remote())))
    if meeting.kind == "finished":
        report.close()


def _one_process(spec: Mapping[str, Any], relay: Relay, group: Group, number: int) -> End:
    """From the fork of a training process to its end."""
    rank = int(spec["rank"])
    log = Path(spec["run_dir"]) / "logs" / f"rank-{rank}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = process_environment(spec["config"])
    process = agent.launch(fork_server_of(environment), "train", spec, log, environment)

    def call_in() -> None:
        if ray.get(relay.tell.mailbox.failure.remote(group, number)):
            process.kill()

    threading.Thread(target=call_in, name="call in", daemon=True).start()
    try:
        code = relay.run(process)
    finally:
        process.close()
    return End(
        rank=rank,
        code=code,
        step=relay.step,
        time_s=time.time(),
        log=str(log),
        called_in=process.killed and code < 0,
        address=ray.util.get_node_ip_address(),
        port=_free_port(),
        error=relay.error,
    )


def _begin(mailbox: Any) -> dict[str, Any]:
    """What rank 0 decides for all workers of an attempt: where they meet, or that there is nothing to begin."""
    stop = ray.get(mailbox.stopping.remote())
    return {"address": ray.util.get_node_ip_address(), "port": _free_port(), "number": time.time(), "stop": stop}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _stopped(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The end of a run that was asked to leave before its process could tell."""
    config = checkpoint.CheckpointConfig.model_validate(settings["config"]["checkpoint"])
    found, _ = checkpoint.newest(checkpoint.place(config, Path(settings["run_dir"])), contents=False)
    return {"event": "done", "step": found.step if found else 0, "stopped": True}


def publish_task(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The Ray task that measures and registers a run; yields its events."""
    log = Path(spec["run_dir"]) / "logs" / "publish.log"
    environment = process_environment(spec["config"])
    process = agent.launch(fork_server_of(environment), "publish", spec, log, environment)
    try:
        yield from process.events()
    finally:
        process.close()


def fork_server_of(environment: Mapping[str, str]) -> Path:
    """This node's; a cluster is told from others on the machine by its port."""
    return agent.socket_path(ray.get_runtime_context().gcs_address.rsplit(":", 1)[-1], environment)


def process_environment(config: Mapping[str, Any]) -> Mapping[str, str]:
    """The training process's: without GPUs where the recipe asks for none, for Ray hides them from nobody."""
    return os.environ if config["workers"]["gpus"] else {**os.environ, "DS_ACCELERATOR": "cpu"}
