"""Ray Tune wiring: trials are Ray Train runs on the node's one warm fork server.

A trial that has ended leaves ``result.json`` in its folder; the same sweep again runs only what is missing or has
failed, and an interrupted trial goes on from its checkpoint. Nothing of Tune's own state is read back, because it is
pickled.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

from training import checkpoint, ray_agent, ray_relay, ray_train
from training.errors import TrainingError
from training.ray_resources import check_resources
from training.sweep import SweepJob, Trial, check_held_out, rank, read_trial, write_trial

__all__ = ["SweepJob", "Trial", "run"]

METRIC = "held_out_loss"
DRIVER_CPUS = 0.01
"""What the driver of a trial reserves. With Ray's default of a whole CPU, two cores deadlock."""


def run(job: SweepJob, on_event: Callable[[dict[str, Any]], None]) -> list[Trial]:
    """Run the trials that have no result yet or have failed; returns all of them, best first.

    Args:
        job: the sweep.
        on_event: gets the trials' events, with the trial's number as ``label``, and ``trial`` events at their end.

    Raises:
        ConfigError: a searched field is unknown, or the cluster can never run one of the trials.
        DataError: the data set has nothing held out to measure trials by.
        TrainingError: no trial came through with a held-out loss.
        KeyboardInterrupt: interrupted; running trials have saved a checkpoint.
    """
    check_held_out(job.data)
    concurrent = _concurrent(job)
    missing = [
        number
        for number in range(job.sweep.trials)
        if (trial := read_trial(job, number)) is None or trial.status == "failed"
    ]
    if missing:
        _run_missing(job, missing, concurrent, on_event)
    trials = [trial for number in range(job.sweep.trials) if (trial := read_trial(job, number))]
    ranked = rank(trials)
    if not ranked or ranked[0].status == "failed":
        reasons = [trial.reason for trial in trials if trial.reason]
        raise TrainingError(
            f"No trial came through with a held-out loss. {reasons[0] if reasons else ''}".strip(),
            rule="at least one trial that trains",
            mend=f"the logs {job.folder}/trials/*/logs/rank-*.log tell more",
        )
    return ranked


def _concurrent(job: SweepJob) -> int:
    """How many trials may run at a time, so many that even the largest of them find their resources.

    Raises:
        ConfigError: a trial's recipe is not valid, or the cluster can never run it.
    """
    total = ray.cluster_resources().get("CPU", 0.0)
    fits = []
    for number in range(job.sweep.trials):
        workers = (config := job.config(number)).workers
        groups = check_resources(config, DRIVER_CPUS) // workers.largest
        together = int(total / (workers.largest * workers.cpus + DRIVER_CPUS) + 1e-6)
        fits.append(max(1, min(groups, together)))  # alone, an elastic trial makes do with what there is
    return min(job.sweep.concurrent or min(fits), *fits)


def _run_missing(
    job: SweepJob, missing: list[int], concurrent: int, on_event: Callable[[dict[str, Any]], None]
) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / "tune.log").open("a") as log, _into(log):
        _follow(job, missing, concurrent, on_event)


@contextlib.contextmanager
def _into(log: TextIO) -> Iterator[None]:
    """What Tune says goes to a file: even told to be silent, it prints tables, and a traceback for each bad trial.

    Ours is the progress, a trial's result has its reason, and stdout is for results.
    """
    logger, handler = logging.getLogger("ray.tune"), logging.StreamHandler(log)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with contextlib.redirect_stdout(log):
            yield
    finally:
        logger.propagate = True
        logger.removeHandler(handler)


def _follow(job: SweepJob, missing: list[int], concurrent: int, on_event: Callable[[dict[str, Any]], None]) -> None:
    mailbox = ray_agent.open_mailbox()

    def pass_on(events: ray_relay.Events) -> None:
        for event in events:
            on_event(event)

    interrupted, failure = ray_train.follow(_tuner(job, missing, concurrent, mailbox).fit, mailbox, pass_on)
    if interrupted:
        raise KeyboardInterrupt
    if failure:
        raise TrainingError(f"The sweep failed: {failure}") from failure


def _tuner(job: SweepJob, missing: list[int], concurrent: int, mailbox: Any) -> tune.Tuner:
    trainable = tune.with_resources(tune.with_parameters(_trial, job=job, mailbox=mailbox), {"CPU": DRIVER_CPUS})
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
    """The driver of one trial: a Ray Train run whose reports go to Tune.

    Raises:
        TrainingError: it came back before its last step. Agents return after an error that trying again cannot mend.
    """
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
    if not ray.get(mailbox.stopping.remote()):
        last, _ = checkpoint.newest(checkpoint.place(train.config.checkpoint, train.run_dir), contents=False)
        if last is None or last.step < train.config.steps:
            raise TrainingError(ray.get(mailbox.reason.remote(train.label)) or "it ended before its last step")


class _Results(tune.Callback):
    """Writes down how each trial ended."""

    def __init__(self, job: SweepJob, mailbox: Any) -> None:
        self.job, self.mailbox = job, mailbox

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Finished, or stopped by ASHA. An interrupted trial has no result: it goes on next time."""
        if ray.get(self.mailbox.stopping.remote()):
            return
        done = "finished" if _step(trial) >= self.job.sweep.steps else "stopped"
        self._write(trial, "failed" if _loss(trial) is None else done)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """One bad trial never ends the sweep."""
        self._write(trial, "failed")

    def _write(self, trial: Any, status: Any) -> None:
        number, step, loss = int(trial.config["number"]), _step(trial), _loss(trial)
        reason = "" if status != "failed" else self._reason(number, trial.error_file)
        result = Trial(number, self.job.sweep.values(number), status, step, loss, reason)
        write_trial(self.job, result)
        self.mailbox.put.remote([{"event": "trial", "label": str(number), **asdict(result)}])

    def _reason(self, number: int, error_file: str | None) -> str:
        """What the training process said, or else what Ray did."""
        told: str = ray.get(self.mailbox.reason.remote(str(number)))
        return told or (error_file and _tail(error_file)) or "it ended without a finite held-out loss"


def _step(trial: Any) -> int:
    return int(trial.last_result.get("training_step", 0))


def _loss(trial: Any) -> float | None:
    """The last held-out loss; None where there is none, and for what is not finite, which no ranking can place."""
    loss = trial.last_result.get(METRIC)
    return float(loss) if loss is not None and math.isfinite(loss) else None


def _tail(path: str) -> str:
    text = Path(path).read_text(errors="replace").strip()
    return text.splitlines()[-1] if text else ""
