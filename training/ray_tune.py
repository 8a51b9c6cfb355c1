"""Ray Tune wiring: trials are Ray Train runs on the node's one warm fork server.

A trial that has ended leaves ``result.json`` in its folder; the same sweep again runs only what is missing or has
failed, and an interrupted trial goes on from its checkpoint. Nothing of Tune's own state is read back, because it is
pickled.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

from training import ray_agent, ray_train
from training.config import TrainConfig, override, parse
from training.errors import TrainingError
from training.sweep_config import SweepConfig

METRIC = "held_out_loss"
RESULT = "result.json"


@dataclass(frozen=True)
class Trial:
    """How one trial ended.

    Attributes:
        number: which, from 0.
        values: the recipe fields that it tried.
        status: ``finished`` all steps, ``stopped`` by ASHA, or ``failed``.
        step: optimizer steps at the last evaluation.
        loss: the held-out loss there; None when it never got that far.
        reason: why it failed.
    """

    number: int
    values: Mapping[str, Any]
    status: Literal["finished", "stopped", "failed"]
    step: int
    loss: float | None
    reason: str = ""


@dataclass(frozen=True)
class SweepJob:
    """A sweep to run, and where.

    Attributes:
        recipe: what every trial starts from.
        sweep: what is searched.
        folder: the sweep's folder, on storage that every node sees.
        tracking_uri: the MLflow server.
        tags: go to every MLflow run.
        parent_run_id: the sweep's own MLflow run.
    """

    recipe: TrainConfig
    sweep: SweepConfig
    folder: Path
    tracking_uri: str
    tags: Mapping[str, str] = field(default_factory=dict)
    parent_run_id: str | None = None

    def config(self, number: int) -> TrainConfig:
        """The recipe of one trial.

        Raises:
            ConfigError: a searched field is unknown or its value not valid.
        """
        values = self.recipe.model_dump(mode="json")
        values["name"] = f"{self.recipe.name[:70]}-trial-{number:02d}"
        values["steps"] = self.sweep.steps
        values["evaluation"] |= {"every_steps": self.sweep.grace_steps, "images": 0}
        values["checkpoint"] |= {"every_steps": max(1, self.sweep.steps), "keep": 1}
        for key, value in self.sweep.values(number).items():
            override(values, key, value)
        return parse(values, source=f"trial {number}")

    def trial_folder(self, number: int) -> Path:
        """Where one trial keeps its state."""
        return self.folder / "trials" / f"{number:03d}"


def run(job: SweepJob, on_event: Callable[[dict[str, Any]], None]) -> list[Trial]:
    """Run the trials that have no result yet or have failed; returns all of them, best first.

    Args:
        job: the sweep.
        on_event: gets the trials' events, with the trial's number as ``label``, and ``trial`` events at their end.

    Raises:
        ConfigError: a searched field is unknown, or the cluster can never run a trial.
        TrainingError: no trial came as far as a held-out loss.
        KeyboardInterrupt: interrupted; running trials have saved a checkpoint.
    """
    configs = [job.config(number) for number in range(job.sweep.trials)]
    ray_train.check_resources(configs[0])
    missing = [
        number
        for number in range(job.sweep.trials)
        if (trial := _read(job, number)) is None or trial.status == "failed"
    ]
    if missing:
        _run_missing(job, missing, on_event)
    trials = [trial for number in range(job.sweep.trials) if (trial := _read(job, number))]
    measured = [trial for trial in trials if trial.loss is not None]
    if not measured:
        reasons = [trial.reason for trial in trials if trial.reason]
        raise TrainingError(
            f"No trial came as far as a held-out loss. {reasons[0] if reasons else ''}".strip(),
            rule="a data set with held-out pictures, and at least one trial that trains",
            mend=f"the logs {job.folder}/trials/*/logs/rank-*.log tell more",
        )
    # ASHA compares equal steps; among trials, those that came further won their rungs
    return sorted(measured, key=lambda trial: (-trial.step, trial.loss or 0.0)) + [t for t in trials if t.loss is None]


def _run_missing(job: SweepJob, missing: list[int], on_event: Callable[[dict[str, Any]], None]) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    # Tune prints tables even when it is told to be silent; ours is the progress, and stdout is for results
    with (job.folder / "tune.log").open("a") as log, contextlib.redirect_stdout(log):
        _follow(job, missing, on_event)


def _follow(job: SweepJob, missing: list[int], on_event: Callable[[dict[str, Any]], None]) -> None:
    mailbox = ray_agent.Mailbox.remote()  # type: ignore[attr-defined]

    def pass_on(events: ray_agent.Events) -> None:
        for event in events:
            on_event(event)

    interrupted, failure = ray_train.follow(_tuner(job, missing, mailbox).fit, mailbox, pass_on)
    if interrupted:
        raise KeyboardInterrupt
    if failure:
        raise TrainingError(f"The sweep failed: {failure}") from failure


def _tuner(job: SweepJob, missing: list[int], mailbox: Any) -> tune.Tuner:
    workers = job.recipe.workers
    fits = int(ray.cluster_resources()["CPU"] // (workers.count * workers.cpus + 0.01))
    if workers.gpus:
        fits = min(fits, int(ray.cluster_resources().get("GPU", 0) // (workers.count * workers.gpus)))
    concurrent = max(1, min(job.sweep.concurrent or fits, fits))
    # The driver of a trial takes a hundredth of a CPU: with the default of a whole one, two cores deadlock.
    trainable = tune.with_resources(tune.with_parameters(_trial, job=job, mailbox=mailbox), {"CPU": 0.01})
    return tune.Tuner(
        trainable,
        param_space={"number": tune.grid_search(missing)},
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="min",
            max_concurrent_trials=concurrent,
            scheduler=ASHAScheduler(
                time_attr="training_step",
                max_t=job.sweep.steps,
                grace_period=min(job.sweep.grace_steps, job.sweep.steps),
                reduction_factor=job.sweep.reduction,
            ),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(job.folder / "ray"),
            verbose=0,
            callbacks=[_Results(job, mailbox)],
            failure_config=tune.FailureConfig(max_failures=0),  # Ray Train has restarted it as often as the recipe says
        ),
    )


def _trial(config: dict[str, Any], job: SweepJob, mailbox: Any) -> None:
    """The driver of one trial: a Ray Train run whose reports go to Tune."""
    if ray.get(mailbox.stopping.remote()):
        return
    number = int(config["number"])
    train = ray_train.TrainJob(
        config=job.config(number),
        run_dir=job.trial_folder(number),
        tracking_uri=job.tracking_uri,
        tags={**job.tags, "ray.trial_id": tune.get_context().get_trial_id(), "darkroom.trial": str(number)},
        parent_run_id=job.parent_run_id,
        label=str(number),
    )
    train.run_dir.mkdir(parents=True, exist_ok=True)
    ray_train.trainer(train, mailbox, callbacks=[TuneReportCallback()]).fit()


class _Results(tune.Callback):
    """Writes down how each trial ended."""

    def __init__(self, job: SweepJob, mailbox: Any) -> None:
        self.job, self.mailbox = job, mailbox

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Finished, or stopped by ASHA. An interrupted trial has no result: it goes on next time."""
        if ray.get(self.mailbox.stopping.remote()):
            return
        step = int(trial.last_result.get("training_step", 0))
        done = "finished" if step >= self.job.sweep.steps else "stopped"
        self._write(trial, "failed" if METRIC not in trial.last_result else done, step)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """One bad trial never ends the sweep."""
        self._write(trial, "failed", int(trial.last_result.get("training_step", 0)))

    def _write(self, trial: Any, status: Any, step: int) -> None:
        number = int(trial.config["number"])
        reason = "" if status != "failed" else self._reason(number, trial.error_file)
        loss = trial.last_result.get(METRIC)
        result = Trial(number, self.job.sweep.values(number), status, step, loss, reason)
        path = self.job.trial_folder(number) / RESULT
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"fingerprint": _fingerprint(self.job, number), **asdict(result)}))
        partial.rename(path)
        self.mailbox.put.remote([{"event": "trial", "label": str(number), **asdict(result)}])

    def _reason(self, number: int, error_file: str | None) -> str:
        """What the training process said, or else what Ray did."""
        told: str = ray.get(self.mailbox.reason.remote(str(number)))
        return told or (error_file and _tail(error_file)) or "it ended without an evaluation"


def _tail(path: str) -> str:
    text = Path(path).read_text(errors="replace").strip()
    return text.splitlines()[-1] if text else ""


def _fingerprint(job: SweepJob, number: int) -> Any:
    return job.config(number).model_dump(mode="json")


def _read(job: SweepJob, number: int) -> Trial | None:
    """How a trial ended; None when it has not, or was of another recipe."""
    path = job.trial_folder(number) / RESULT
    if not path.is_file():
        return None
    values = json.loads(path.read_text())
    if values.pop("fingerprint") != _fingerprint(job, number):
        return None
    return Trial(**values)
