"""A sweep on disk: its trials' recipes, how they ended, and which is best. Knows nothing of Ray."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from training.config import TrainConfig, override, parse
from training.data.dataset import Dataset
from training.errors import DataError
from training.sweep_config import SweepConfig

RESULT = "result.json"


@dataclass(frozen=True)
class Trial:
    """How one trial ended.

    Attributes:
        number: which, from 0.
        values: the recipe fields that it tried.
        status: ``finished`` all steps, ``stopped`` by ASHA, or ``failed``.
        step: optimizer steps at the last evaluation.
        loss: the held-out loss there; None when it never got that far, or was not finite.
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

    @cached_property
    def data(self) -> Dataset:
        """The data set that the trials share.

        Raises:
            DataError: it is not there, or damaged.
        """
        return Dataset.open(self.recipe.data.path, self.recipe.data.disk_cache)

    def trial_folder(self, number: int) -> Path:
        """Where one trial keeps its state."""
        return self.folder / "trials" / f"{number:03d}"


def rank(trials: list[Trial]) -> list[Trial]:
    """Best first: by steps and then by loss; failed trials last, whatever their loss was before they failed."""
    # ASHA compares equal steps; among trials, those that came further won their rungs
    good = [trial for trial in trials if trial.status != "failed" and trial.loss is not None]
    best = sorted(good, key=lambda trial: (-trial.step, trial.loss))
    return best + [trial for trial in trials if trial not in good]


def check_held_out(data: Dataset) -> None:
    """Refuse a data set that trials cannot be compared on.

    Raises:
        DataError: nothing of it is held out.
    """
    count = data.manifest.splits["held_out"].count
    if not count:
        raise DataError(
            "The data set has no held-out pictures, and a sweep compares its trials by their loss on such.",
            value=f"{data.path}: {count} held out",
            rule="at least one held-out picture",
            mend="build it again with a larger share held out: darkroom data build ... --held-out 0.1",
        )


def fingerprint(job: SweepJob, number: int) -> Any:
    """What a trial's result is a result of."""
    return {"recipe": job.config(number).model_dump(mode="json"), "data": job.data.hash}


def write_trial(job: SweepJob, trial: Trial) -> None:
    """Keep how a trial ended."""
    path = job.trial_folder(trial.number) / RESULT
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"fingerprint": fingerprint(job, trial.number), **asdict(trial)}))
    partial.rename(path)


def read_trial(job: SweepJob, number: int) -> Trial | None:
    """How a trial ended; None when it has not, or was of another recipe or data set."""
    path = job.trial_folder(number) / RESULT
    if not path.is_file():
        return None
    values = json.loads(path.read_text())
    if values.pop("fingerprint") != fingerprint(job, number):
        return None
    return Trial(**values)
