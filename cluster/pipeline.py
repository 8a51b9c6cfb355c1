"""The stages from a data set to a published model, each resumable by calling it again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import forecasts
from cluster.console import say
from cluster.progress import TrainProgress
from training.errors import DataError

if TYPE_CHECKING:
    from cluster.stack import Stack
    from training.config import TrainConfig
    from training.ray_train import TrainOutcome
    from training.ray_tune import Trial
    from training.sweep_config import SweepConfig

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Place:
    """Where runs are kept and tracked.

    Attributes:
        stack: the cluster and its MLflow server.
        runs: the folder of all runs, on storage that every node sees.
    """

    stack: Stack
    runs: Path

    def run_dir(self, name: str) -> Path:
        """The folder of one run."""
        return self.runs / name


@dataclass(frozen=True)
class Published:
    """A registered version of a model."""

    name: str
    """The registered model."""
    version: int
    """Its version."""
    metrics: Mapping[str, float]
    """What was measured before it was registered."""


def connect(stack: Stack) -> None:
    """Join the Ray cluster as a driver; a second call finds it joined.

    Raises:
        StackError: it cannot be joined.
    """
    import logging

    import ray

    from training.errors import StackError

    if ray.is_initialized():
        return
    try:
        ray.init(address=stack.ray_address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        raise StackError(
            "The Ray cluster cannot be joined.", value=stack.ray_address, rule=str(error).splitlines()[0]
        ) from error


def load(reference: str, assignments: Sequence[str], data: str | None = None) -> TrainConfig:
    """A recipe as every worker can read it: overrides applied, paths absolute.

    Args:
        reference: a packaged recipe's name or a YAML file.
        assignments: ``section.key=value`` pairs.
        data: the data set's folder or URL, if it is not in the recipe or among the pairs.

    Raises:
        ConfigError: the recipe is not valid.
    """
    from training.config import load_recipe

    # quoted: YAML would read a colon or a # in a path as its own
    path = [f"data.path={json.dumps(data, ensure_ascii=False)}"] if data else []
    return resolve(load_recipe(reference, [*path, *assignments]))


def resolve(config: TrainConfig) -> TrainConfig:
    """The recipe with its paths made absolute: a worker's current directory is not the caller's."""
    from training.conditioning_config import PACKAGED_ENCODER, TextConfig
    from training.data.storage import Folder

    changed: dict[str, Any] = {}
    if config.data.path:
        path = Folder.at(config.data.path).place
        changed["data"] = config.data.model_copy(update={"path": path})
    told = config.conditioning
    if isinstance(told, TextConfig) and told.encoder != PACKAGED_ENCODER:
        changed["conditioning"] = told.model_copy(update={"encoder": str(Path(told.encoder).absolute())})
    if config.latents is not None:
        place = str(Path(config.latents.autoencoder).absolute())
        changed["latents"] = config.latents.model_copy(update={"autoencoder": place})
    if config.start is not None and config.start.adapters:
        merged = tuple(
            each.model_copy(update={"path": str(Path(each.path).expanduser().absolute())})
            for each in config.start.adapters
        )
        changed["start"] = config.start.model_copy(update={"adapters": merged})
    if config.checkpoint.path:
        place = Folder.at(config.checkpoint.path).place
        changed["checkpoint"] = config.checkpoint.model_copy(update={"path": place})
    return config.model_copy(update=changed)


def as_yaml(config: TrainConfig) -> str:
    """The whole recipe as a file that needs no other: what a job gets."""
    import yaml

    text: str = yaml.safe_dump(config.model_dump(mode="json"), allow_unicode=True, sort_keys=False)
    return text


def check_data(config: TrainConfig) -> None:
    """Refuse a recipe without data before anything is started.

    Raises:
        DataError: no data set at ``data.path``.
    """
    from training.data.dataset import is_dataset

    if not config.data.path or not is_dataset(config.data.path):
        raise DataError(
            "There is no data set.",
            value=config.data.path or None,
            rule="data.path is a folder or URL that `darkroom data build` made, or one of WebDataset shards",
            mend="darkroom data build PICTURES DATA, then --data DATA",
        )


def data_hash(config: TrainConfig) -> str:
    """What names the recipe's data set: its path stays when it is built anew.

    Raises:
        DataError: there is none, or it is damaged.
    """
    from training.data.dataset import Dataset

    return Dataset.open(config.data.path, config.data.disk_cache).hash


def finished(place: Place, config: TrainConfig) -> bool:
    """Whether the run has come to its end with this very recipe and data set."""
    from training import checkpoint

    kept = checkpoint.place(config.checkpoint, place.run_dir(config.name))
    found, _ = checkpoint.newest(kept, contents=False)
    if found is None or found.step < config.steps or found.about["config"] != config.model_dump(mode="json"):
        return False
    return bool(found.about["data_hash"] == data_hash(config))


def train(place: Place, config: TrainConfig, began_s: float | None = None) -> TrainOutcome:
    """Train a run to its end, from its newest checkpoint where there is one."""
    progress = TrainProgress(config.steps, config.global_batch, began_s or time.time())
    progress.mark("command and recipe")
    connect(place.stack)
    progress.mark("joining Ray")
    room = forecasts.require_room(config, place.run_dir(config.name))
    from training import ray_train, resume
    from training.tracking import provenance_tags, require_server

    progress.mark("import of Ray Train")
    resume.refuse_early(config, place.run_dir(config.name), data_hash(config))
    require_server(place.stack.mlflow_url)
    job = ray_train.TrainJob(config, place.run_dir(config.name), place.stack.mlflow_url, provenance_tags(REPOSITORY))
    progress.mark("provenance")
    room.result()
    progress.mark("forecast")
    with progress:
        return ray_train.fit(job, progress.on_event)


def sweep(place: Place, config: TrainConfig, sweep_config: SweepConfig) -> list[Trial]:
    """Run a sweep's missing trials; all trials, best first. Its own MLflow run holds them."""
    from training import ray_tune
    from training.tracking import RunContext, Tracker, provenance_tags

    connect(place.stack)
    tags = provenance_tags(REPOSITORY)
    recipe = {
        "recipe": config.model_dump(mode="json"),
        "sweep": sweep_config.model_dump(mode="json"),
        "data_hash": data_hash(config),
    }
    # the same sweep again is continued; another one gets a folder of its own
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    folder = place.run_dir(f"{config.name}-sweep-{digest[:8]}")
    context = RunContext(
        uri=place.stack.mlflow_url,
        experiment=config.tracking.experiment,
        name=folder.name,
        run_dir=folder,
        config=recipe,
        tags=tags,
    )
    tracker = Tracker.open(context)
    status: Any = "FAILED"
    try:
        job = ray_tune.SweepJob(config, sweep_config, folder, place.stack.mlflow_url, tags, tracker.run_id)
        with TrainProgress(sweep_config.steps, config.global_batch, time.time()) as progress:
            trials = ray_tune.run(job, progress.on_event)
        best = trials[0]
        (folder / "best.json").write_text(json.dumps({"values": dict(best.values), "loss": best.loss}, indent=1))
        tracker.log_metrics(best.step, {"best_held_out_loss": best.loss or 0.0, "best_trial": best.number})
        tracker.log_artifact(folder / "best.json")
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.close(status)
    return trials


def publish(place: Place, config: TrainConfig, images: int = 128) -> Published:
    """Measure a finished run, write its bundle and register it; what is registered already stays as it is.

    Args:
        place: where it is.
        config: the run's recipe.
        images: pictures made for the kernel distance, at most.
    """
    from training import ray_train

    run_dir = place.run_dir(config.name)
    record, of = run_dir / "published.json", _publication(run_dir, config, images)
    if record.is_file():
        known = json.loads(record.read_text())
        if known.pop("of", None) == of and _is_registered(place, known["name"], known["version"]):
            return Published(**known)
    connect(place.stack)
    job = ray_train.TrainJob(config, run_dir, place.stack.mlflow_url)
    event = ray_train.publish(job, images, lambda told: say(told["message"]) if told["event"] == "stage" else None)
    published = Published(event["name"], int(event["version"]), event["metrics"])
    partial = record.with_suffix(".partial")
    partial.write_text(json.dumps({**vars(published), "of": of}, indent=1))
    partial.rename(record)
    return published


def _publication(run_dir: Path, config: TrainConfig, images: int) -> dict[str, Any]:
    """What a published version is made and measured of; when any of it changes, it is published again."""
    from training import checkpoint

    found, _ = checkpoint.newest(checkpoint.place(config.checkpoint, run_dir), contents=False)
    tracked = run_dir / "mlflow_run.json"
    return {
        "recipe": config.model_dump(mode="json"),
        "data_hash": data_hash(config),
        "images": images,
        "step": found.step if found else 0,
        "run_id": json.loads(tracked.read_text())["run_id"] if tracked.is_file() else "",
    }


def _is_registered(place: Place, name: str, version: int) -> bool:
    from training import registry
    from training.errors import RegistryError

    try:
        return any(known.version == version for known in registry.versions(place.stack.mlflow_url, name))
    except RegistryError:
        return False
