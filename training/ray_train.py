"""Ray Train wiring: agents in, reports out.

Ray's workers are thin agents (``training.ray_agent``). They replace training processes that fail by themselves. When an
agent or a node is lost, Ray Train restarts the group. Either way, the new processes go on from the newest state.
"""

from __future__ import annotations

import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from training.config import TrainConfig
from training.errors import TrainingError
from training.interrupt import Interrupts
from training.ray_agent import agent_loop, cause, open_mailbox, publish_task
from training.ray_relay import FLUSH_S, Events
from training.ray_resources import WAITS_FOR_ROOM_S, check_resources, sizes, taken

LOOKS_EVERY_S = ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
"""How soon Ray Train notices that an agent is lost; 2 s unless told. The user's own setting wins."""

SILENCE_S = 10.0
"""Without a word of a worker for so long, it is looked at whether they wait for resources."""


@dataclass(frozen=True)
class TrainJob:
    """A run to train, and where.

    Attributes:
        config: the recipe.
        run_dir: the run's folder, on storage that every node sees.
        tracking_uri: the MLflow server.
        tags: go to the MLflow run.
        parent_run_id: the sweep's MLflow run.
        label: goes into every event, so that trials can be told apart.
    """

    config: TrainConfig
    run_dir: Path
    tracking_uri: str
    tags: Mapping[str, str] = field(default_factory=dict)
    parent_run_id: str | None = None
    label: str = ""


@dataclass(frozen=True)
class TrainOutcome:
    """How a run ended.

    Attributes:
        step: optimizer steps done.
        stopped: True when it was asked to leave before its last step.
        metrics: the last evaluation's.
        run_id: the MLflow run.
    """

    step: int
    stopped: bool
    metrics: Mapping[str, float]
    run_id: str


def trainer(job: TrainJob, mailbox: Any, callbacks: list[Any] | None = None) -> DataParallelTrainer:
    """Ray Train's trainer for a job."""
    config = job.config
    os.environ.setdefault(*LOOKS_EVERY_S)
    if config.workers.elastic:
        os.environ.setdefault(*WAITS_FOR_ROOM_S)
    return DataParallelTrainer(
        agent_loop,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "run_dir": str(job.run_dir),
            "tracking_uri": job.tracking_uri,
            "tags": dict(job.tags),
            "parent_run_id": job.parent_run_id,
            "label": job.label,
            "mailbox": mailbox,
        },
        scaling_config=ScalingConfig(
            num_workers=sizes(config.workers),
            elastic_resize_monitor_interval_s=config.workers.resize_every_s,
            use_gpu=config.workers.gpus > 0,
            resources_per_worker={"CPU": config.workers.cpus}
            | ({"GPU": config.workers.gpus} if config.workers.gpus else {}),
        ),
        run_config=ray.train.RunConfig(
            # our checkpoints are the run's memory: Ray's own bookkeeping starts afresh each time
            name=f"{config.name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(job.run_dir / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=config.workers.max_failures),
            callbacks=callbacks or [],
        ),
    )


def fit(job: TrainJob, on_event: Callable[[dict[str, Any]], None]) -> TrainOutcome:
    """Train to the end, from the newest checkpoint where there is one.

    Ctrl-C asks the processes to checkpoint and leave, and then returns with ``stopped``.

    Args:
        job: the run.
        on_event: gets every event in order, in this thread: ``mark``, ``encoding``, ``step``, ``evaluation``,
            ``samples``, ``checkpoint``, ``resumed``, ``warning``, ``error``, ``done``, ``tracked``.

    Raises:
        ConfigError: the cluster can never give the workers.
        TrainingError: the run failed; the message says why and names the log.
    """
    check_resources(job.config)
    job.run_dir.mkdir(parents=True, exist_ok=True)
    mailbox = open_mailbox()
    reader = _Reader(on_event)
    _, failure = follow(trainer(job, mailbox).fit, mailbox, reader.read)
    return reader.outcome(job, failure)


def follow(fit: Callable[[], object], mailbox: Any, read: Callable[[Events], None]) -> tuple[bool, Exception | None]:
    """Call ``fit`` beside, and pass events on until it ends; Ctrl-C asks the training processes to leave.

    Returns:
        Whether Ctrl-C came, and what ``fit`` raised.
    """
    failure: list[Exception] = []

    def run() -> None:
        try:
            fit()
        except Exception as error:  # noqa: BLE001  handed to the thread that waits
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    told, look_at = False, time.monotonic() + SILENCE_S
    with Interrupts() as interrupts:
        while thread.is_alive():
            thread.join(FLUSH_S)
            events = ray.get(mailbox.drain.remote())
            read(events)
            if events:
                look_at = math.inf  # workers have come
            elif time.monotonic() > look_at:
                message = taken()
                read([{"event": "warning", "message": message}] if message else [])
                look_at = math.inf if message else time.monotonic() + SILENCE_S
            if interrupts.wished and not told:
                told = True
                read([{"event": "warning", "message": "Interrupted: saving a checkpoint. Once more leaves at once."}])
                ray.get(mailbox.stop.remote())
    read(ray.get(mailbox.drain.remote()))
    return told, failure[0] if failure else None


class _Reader:
    """Follows the events of one run."""

    def __init__(self, on_event: Callable[[dict[str, Any]], None]) -> None:
        self.on_event = on_event
        self.step, self.stopped, self.done, self.run_id = 0, False, False, ""
        self.metrics: dict[str, float] = {}
        self.error: dict[str, Any] | None = None

    def read(self, events: Events) -> None:
        """Take note of events and pass them on."""
        for event in events:
            kind = event["event"]
            if kind == "error":
                self.error, self.done = cause(self.error, event), False  # one rank's end is not that of all
            elif kind == "evaluation":
                self.metrics = dict(event["metrics"])
            elif kind == "tracked":
                self.run_id = event["run_id"]
            elif kind == "done":
                self.step, self.stopped, self.done = event["step"], event["stopped"], True
            self.on_event(event)

    def outcome(self, job: TrainJob, failure: Exception | None) -> TrainOutcome:
        """How it ended.

        Raises:
            TrainingError: it did not end well.
        """
        if self.done and not failure:
            return TrainOutcome(self.step, self.stopped, self.metrics, self.run_id)
        if self.error and self.error.get("typed"):
            error = TrainingError(self.error["message"])
            error.exit_code = self.error.get("exit_code", 1)
            raise error
        reason = self.error["message"] if self.error else failure or "no worker reported"
        raise TrainingError(
            f"Training failed: {reason}", mend=f"the logs {job.run_dir}/logs/rank-*.log tell more"
        ) from failure


def publish(job: TrainJob, images: int, on_event: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure a finished run and register it, as a Ray task of one worker's size.

    Returns:
        The ``published`` event: ``name``, ``version`` and ``metrics``.

    Raises:
        TrainingError: it failed; the message says why.
    """
    workers = job.config.workers
    spec = {
        "config": job.config.model_dump(mode="json"),
        "run_dir": str(job.run_dir),
        "tracking_uri": job.tracking_uri,
        "images": images,
    }
    size = {"num_cpus": workers.cpus, "num_gpus": workers.gpus, "max_retries": 0}
    stream: Any = ray.remote(publish_task).options(num_returns="streaming", **size).remote(spec)
    log = job.run_dir / "logs" / "publish.log"
    reasons = []
    for reference in stream:
        event: dict[str, Any] = ray.get(reference)
        on_event(event)
        if event["event"] == "published":
            return event
        if event["event"] == "error":
            reasons.append(event["message"])
    raise TrainingError(reasons[-1] if reasons else "Publishing ended without a word.", mend=f"its log is {log}")
