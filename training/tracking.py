"""MLflow runs: what a training run tells about itself, while it runs and afterwards.

Needs a server over HTTP. MLflow is imported late and threads start in ``Tracker.open`` only, so that a training
process forked from one that imported this module works.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from training import outbox
from training.errors import TrackingError
from training.mlflow_server import connect, require_server
from training.provenance import flatten, mask_logins, mask_secrets, provenance_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from PIL import Image

__all__ = ["RunContext", "Tracker", "TrackingConfig", "connect", "provenance_tags", "require_server"]

_log = logging.getLogger(__name__)
_STATE = "mlflow_run.json"
_METRICS = "metrics.jsonl"
_SYSTEM_METRICS_EVERY_S = 10.0
_PARAMS_PER_REQUEST = 100
_RETRY_S = 1.0


class TrackingConfig(BaseModel):
    """Where runs are filed; the server's address is given when a run starts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    experiment: str = Field(default="darkroom", min_length=1)
    """MLflow experiment."""


@dataclass(frozen=True)
class RunContext:
    """Everything that a run records about itself when it opens.

    Attributes:
        uri: the MLflow server, ``http://host:port``.
        experiment: experiment name; made where it is missing.
        name: run name.
        run_dir: keeps the run's id and its metrics; the same directory resumes the same run.
        config: the full recipe; secrets are masked before it leaves.
        tags: git commit, lock hash, Ray trial id, ...
        dataset_path: where the data set is, ``""`` for none.
        dataset_hash: the data set's name, sha256 hex.
        parent_run_id: the sweep's run, for a trial.
    """

    uri: str
    experiment: str
    name: str
    run_dir: Path
    config: Mapping[str, Any]
    tags: Mapping[str, str] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_hash: str = ""
    parent_run_id: str | None = None


class Tracker:
    """One MLflow run. ``log_*`` never wait for the server and never raise.

    Use ``Tracker.open``; ``close`` it in the end.
    """

    def __init__(self, context: RunContext, client: MlflowClient, run: Run) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        # it says for every run that there is no GPU to watch
        logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
        self.run_id: str = run.info.run_id
        self._metrics = (context.run_dir / _METRICS).open("a", buffering=1)
        self._started_ms: int = run.info.start_time
        # MLflow's collectors without its thread, which gives up the first time that the server is away
        self._system = SystemMetricsMonitor(self.run_id, tracking_uri=context.uri)  # type: ignore[no-untyped-call]
        self._sample_at = time.monotonic()
        self._file_works = True
        self._outbox = outbox.Outbox(client, self.run_id, is_up=lambda: _answers(context.uri))
        self._outbox.start(self._sample_system)  # which puts into the outbox

    @classmethod
    def open(cls, context: RunContext, patience_s: float = 60.0) -> Tracker:
        """Start a run, or go on with the one that ``run_dir`` names.

        Args:
            context: what the run records about itself.
            patience_s: how long a server that is busy, restarting or answers with 5xx is asked again.

        Raises:
            TrackingError: the server could not be reached in that time, or refuses.
        """
        deadline = time.monotonic() + patience_s
        while True:
            try:
                return cls._open(context)
            except TrackingError as error:
                if not _may_pass(error) or time.monotonic() > deadline:
                    raise
                _log.warning("MLflow is asked again: %s", error.message)
                time.sleep(_RETRY_S)

    @classmethod
    def _open(cls, context: RunContext) -> Tracker:
        require_server(context.uri)
        context.run_dir.mkdir(parents=True, exist_ok=True)
        client = connect(context.uri)
        from mlflow.exceptions import MlflowException

        try:
            run = _resume(client, context) or _create(client, context)
            _describe(client, run, context)
        except MlflowException as error:
            raise TrackingError(
                "The MLflow server refused the run.", value=context.name, rule=mask_logins(str(error).splitlines()[0])
            ) from error
        return cls(context, client, run)

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record values of a step, here in ``metrics.jsonl`` and on the server."""
        record = outbox.Metrics(step, {name: float(value) for name, value in metrics.items()})
        line = json.dumps({"step": step, "timestamp_ms": record.timestamp_ms, **record.values})
        try:
            self._metrics.write(line + "\n")
        except (OSError, ValueError) as error:
            if self._file_works:
                _log.warning("%s cannot be written: %s", self._metrics.name, error)
            self._file_works = False
        self._outbox.put(record)

    def log_tag(self, name: str, value: str) -> None:
        """Set a tag of the run."""
        self._outbox.put(outbox.Tag(name, value))

    def log_image(self, image: Image.Image, key: str, step: int) -> None:
        """Add a picture to the run's image grid under ``key``."""
        self._outbox.put(outbox.Picture(image.copy(), key, step))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Add a file or directory to the run's artifacts; it must stay where it is until ``close``."""
        self._outbox.put(outbox.Artifact(path, folder))

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED", timeout_s: float = 10.0) -> int:
        """End the run.

        Returns:
            How many records could not be delivered in time; metrics among them are in ``metrics.jsonl``.
        """
        self._outbox.put(outbox.Status(status))
        undelivered = self._outbox.close(timeout_s)
        self._metrics.close()
        return undelivered

    def _sample_system(self) -> None:
        if time.monotonic() < self._sample_at:
            return
        self._sample_at = time.monotonic() + _SYSTEM_METRICS_EVERY_S
        self._system.collect_metrics()  # type: ignore[no-untyped-call]
        sampled: dict[str, float] = self._system.aggregate_metrics()  # type: ignore[no-untyped-call]
        values = {f"system/{name}": value for name, value in sampled.items()}
        for monitor in self._system.monitors:
            monitor.clear_metrics()  # type: ignore[no-untyped-call]
        # seconds since the run began: the axis goes on where a resumed run left it
        self._outbox.put(outbox.Metrics((int(time.time() * 1000) - self._started_ms) // 1000, values))


def _may_pass(error: TrackingError) -> bool:
    """Whether asking again can help: nothing answered, or the server itself stumbled."""
    return error.__cause__ is not None and not outbox.is_refusal(error.__cause__)


def _answers(uri: str) -> bool:
    try:
        require_server(uri, timeout_s=2)
    except TrackingError:
        return False
    return True


def _resume(client: MlflowClient, context: RunContext) -> Run | None:
    """The run that ``run_dir`` names, running again; None where there is none, or this server doesn't know it."""
    from mlflow.exceptions import MlflowException

    try:
        run_id = json.loads((context.run_dir / _STATE).read_text())["run_id"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        _log.warning("%s cannot be read; a new MLflow run begins.", context.run_dir / _STATE)
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        _log.warning("MLflow at %s does not know run %s; a new one begins.", context.uri, run_id)
        return None
    if run.info.lifecycle_stage != "active":
        _log.warning("MLflow run %s was deleted; a new one begins.", run_id)
        return None
    client.update_run(run_id, status="RUNNING")
    return run


def _create(client: MlflowClient, context: RunContext) -> Run:
    tags = {} if context.parent_run_id is None else {"mlflow.parentRunId": context.parent_run_id}
    run = client.create_run(_experiment(client, context.experiment), tags=tags, run_name=context.name)
    state = {"run_id": run.info.run_id, "experiment_id": run.info.experiment_id, "uri": context.uri}
    aside = context.run_dir / f".{_STATE}.{os.getpid()}"
    aside.write_text(json.dumps(mask_secrets(state)) + "\n")
    aside.replace(context.run_dir / _STATE)
    return run


def _experiment(client: MlflowClient, name: str) -> str:
    """The experiment's id; two runs may make it at the same time."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            # the pages' mode for trained models; by default they show the one for language-model traces
            return str(client.create_experiment(name, tags={"mlflow.experimentKind": "custom_model_development"}))
        except MlflowException as error:
            found = client.get_experiment_by_name(name)
            if found is None or error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    if found.lifecycle_stage != "active":
        raise TrackingError(
            "The experiment was deleted.",
            value=name,
            rule="an active experiment, or a new name",
            mend=f"mlflow experiments restore --experiment-id {found.experiment_id}, or set tracking.experiment",
        )
    return str(found.experiment_id)


def _describe(client: MlflowClient, run: Run, context: RunContext) -> None:
    """Tags, parameters, ``config.yaml`` and the data set; parameters that are already there stay as they are."""
    import yaml
    from mlflow.entities import Param, RunTag

    run_id = run.info.run_id
    config = mask_secrets(context.config)
    tags = {**mask_secrets(context.tags), "darkroom.data_hash": context.dataset_hash}
    client.log_batch(run_id, tags=[RunTag(name, str(value)) for name, value in tags.items() if value])
    params = flatten(config)
    changed = sorted(name for name, value in params.items() if run.data.params.get(name, value) != value)
    if changed:
        _log.warning("MLflow run %s goes on with other values of %s.", run_id, ", ".join(changed))
    fresh = [Param(name, value) for name, value in params.items() if name not in run.data.params]
    for start in range(0, len(fresh), _PARAMS_PER_REQUEST):
        client.log_batch(run_id, params=fresh[start : start + _PARAMS_PER_REQUEST])
    client.log_text(run_id, yaml.safe_dump(config, sort_keys=False), "config.yaml")
    if context.dataset_hash and not (run.inputs and run.inputs.dataset_inputs):
        _log_dataset(client, run_id, context)


def _log_dataset(client: MlflowClient, run_id: str, context: RunContext) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    # what MLflow's MetaDataset sends; it keeps 36 characters of a digest, the whole one is the tag darkroom.data_hash
    dataset = Dataset(
        name=Path(context.dataset_path).name or "dataset",
        digest=context.dataset_hash[:36],
        source_type="local",
        source=json.dumps({"uri": context.dataset_path}),
    )
    client.log_inputs(run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
