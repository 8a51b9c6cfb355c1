"""A finished run becomes a measured bundle in the registry. Runs in a process of its own, like a training rank."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from training import checkpoint, parallel
from training.build import held_out_of
from training.bundle import Provenance, write_bundle
from training.canvas import Canvas
from training.conditioning import Conditioning, Encoder, encoder_for
from training.conditioning_config import CaptionsConfig
from training.config import TrainConfig, parse
from training.data.dataset import Dataset
from training.data.encode import ensure
from training.data.encoded.classes import ClassJob
from training.data.encoded.text import TextJob
from training.data.manifest import SPLITS, SplitName
from training.ema_snapshots import published_average
from training.errors import CheckpointError, TrainingError
from training.evaluate.evaluator import Evaluator
from training.evaluate.features import EfficientNetFeatures
from training.evaluate.held_out import HeldOut
from training.evaluate.kid import kid
from training.evaluate.pictures import read_caption, read_pictures, spread
from training.finetune.network import starting_network
from training.latents import canvas_of
from training.models.trained import load_trained, trained_names
from training.precision import resolve
from training.states import jobs_of, open_states

KID_SUBSETS = 50
KID_SUBSET = 100
KID_REAL = 500
"""Real pictures that generated ones are compared with, at most: five times what a subset takes. Two cores see 50 a
second, so that a whole data set would take longer than the training."""


@dataclass(frozen=True)
class PublishSpec:
    """What to publish.

    Attributes:
        config: the run's recipe.
        run_dir: its folder.
        tracking_uri: the MLflow server.
        images: pictures made for the kernel distance, at most; half of them of held-out captions.
    """

    config: Mapping[str, Any]
    run_dir: str
    tracking_uri: str
    images: int


def main(values: Mapping[str, Any], emit: Callable[[Mapping[str, Any]], None]) -> None:
    """Measure the newest checkpoint's averaged weights, write the bundle and register it.

    A checkpoint that is registered already is not measured again. Emits a ``published`` event with the model's name,
    version and metrics.

    Raises:
        CheckpointError: the run has not come to its end, or its data set is another one now.
        DataError: its data set is gone.
        TrainingError: its weights or what is measured of them is not finite.
        TrackingError: the MLflow server cannot be reached.
        RegistryError: it refuses the model.
    """
    from training import registry

    spec = PublishSpec(**values)
    config, run_dir = parse(spec.config), Path(spec.run_dir)
    dataset = Dataset.open(config.data.path, config.data.disk_cache)
    found = _finished(config, run_dir, dataset)
    run_id = json.loads((run_dir / "mlflow_run.json").read_text())["run_id"]
    of = _digest(config, dataset, found, run_id, spec.images)
    # a command may be killed between the registration and its own note of it
    version = registry.find(spec.tracking_uri, config.name, of)
    if version is None:
        bundle = _bundle(config, dataset, found, spec, run_id, emit)
        version = registry.publish(spec.tracking_uri, bundle, name=config.name, run_id=run_id, of=of)
    emit({"event": "published", "name": version.name, "version": version.version, "metrics": version.metrics})


def _digest(config: TrainConfig, dataset: Dataset, found: checkpoint.Checkpoint, run_id: str, images: int) -> str:
    """Names what a version is made and measured of: the same again is the same version."""
    recipe = config.model_dump(mode="json")
    of = {"run_id": run_id, "step": found.step, "data_hash": dataset.hash, "recipe": recipe, "images": images}
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()


def _bundle(
    config: TrainConfig,
    dataset: Dataset,
    found: checkpoint.Checkpoint,
    spec: PublishSpec,
    run_id: str,
    emit: Callable[[Mapping[str, Any]], None],
) -> Path:
    """The measured bundle of a checkpoint, in the run's folder."""
    torch.set_num_threads(max(config.workers.threads, config.workers.largest))
    average = published_average(config.ema, Path(spec.run_dir), found)
    _check_weights(average, found)
    _look_up(config, dataset)
    encoder, canvas = encoder_for(config.conditioning, dataset), canvas_of(config)
    network = starting_network(config, encoder.shape, canvas.channels, canvas.factor)
    trained = {name.removeprefix("network."): value for name, value in average.items()}
    load_trained(network, trained, trained_names(network))
    emit({"event": "stage", "message": "measuring the held-out loss and the kernel distance"})
    parallel.connect(0, 0, 1, "127.0.0.1", 0)
    metrics = _measure(config, dataset, encoder, canvas, network, spec.images)
    dist.destroy_process_group()
    _check_metrics(metrics)
    # not the present time: publishing the same weights again makes the same bundle
    provenance = Provenance(
        run_id=run_id,
        data_hash=dataset.hash,
        use_digest=found.about["use"]["digest"],
        recipe=config.model_dump(mode="json"),
        metrics=metrics,
        licences=dict(dataset.manifest.licences),
        created_utc=datetime.fromtimestamp(found.manifest.written_s, UTC).isoformat(timespec="seconds"),
        step=found.step,
        code_version=found.about["code"].get("mlflow.source.git.commit", "unknown"),
    )
    emit({"event": "stage", "message": "writing and registering the bundle"})
    return write_bundle(
        Path(spec.run_dir) / "bundle",
        network=network,
        encoder=encoder,
        objective=config.objective,
        canvas=canvas,
        provenance=provenance,
    )


def _look_up(config: TrainConfig, dataset: Dataset) -> None:
    """The classes, and the latents that are measured, where this machine does not hold those of the training."""
    for job in jobs_of(config):
        if isinstance(job, TextJob):
            continue  # its few captions are encoded as they are needed
        for split in SPLITS:
            if split == "held_out" or isinstance(job, ClassJob):
                for _ in ensure(dataset, split, job):
                    pass


def _finished(config: TrainConfig, run_dir: Path, dataset: Dataset) -> checkpoint.Checkpoint:
    """The run's last checkpoint, of this data set."""
    found, _ = checkpoint.newest(checkpoint.place(config.checkpoint, run_dir))
    if found is None or found.step < config.steps:
        raise CheckpointError(
            "The run has not come to its end.",
            value=f"step {found.step if found else 0}",
            rule=f"{config.steps} steps",
            mend="the same `darkroom train` command again goes on",
        )
    if found.about["data_hash"] != dataset.hash:
        raise CheckpointError(
            "The run was trained on another data set than the one that is there now.",
            value=f"{dataset.path}: {dataset.hash}",
            rule=f"data hash {found.about['data_hash']}, as in {found.path}",
            mend="put that data set back, or train under another name with --set name=...",
        )
    return found


def _check_weights(weights: Mapping[str, torch.Tensor], found: checkpoint.Checkpoint) -> None:
    """Nobody can use a network with a weight that is not a number."""
    for name, value in weights.items():
        if not bool(value.isfinite().all()):
            raise TrainingError(
                "The run's averaged weights have diverged.",
                value=f"{name} of {found.path}",
                rule="finite weights",
                mend="train under another name with a lower optimizer.learning_rate",
            )


def _check_metrics(metrics: Mapping[str, float]) -> None:
    """A bundle's manifest is JSON, which has no word for what is not a number."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise TrainingError(
                f"The model is not published: {name} is not a number.",
                value=value,
                rule="finite metrics",
                mend="look at the run's samples; train under another name with a lower optimizer.learning_rate",
            )


def _measure(
    config: TrainConfig, dataset: Dataset, encoder: Encoder, canvas: Canvas, network: Any, images: int
) -> dict[str, float]:
    """Held-out loss, and the kernel distance to held-out and to training pictures.

    All on bounded choices of the pictures, so that measuring takes no longer for a larger data set.
    """
    metrics: dict[str, float] = {}
    extractor = EfficientNetFeatures()
    for name in SPLITS:
        split = dataset.split(name)
        chosen = spread(len(split), images // 2)
        prompts = [read_caption(split, i) for i in chosen]
        real, _ = read_pictures(split, spread(len(split), KID_REAL), config.model.resolution)
        evaluator = Evaluator(
            network,
            config.objective,
            config.evaluation,
            seed=config.seed,
            canvas=canvas,
            held_out=_held_out(config, dataset, encoder) if name == "held_out" else None,
            prompts=prompts,
            prompt_states=_told(config, dataset, name, encoder, chosen),
            unconditional=encoder.encode([""]),
            device="cuda" if torch.cuda.is_available() else "cpu",
            precision=resolve(config.engine.precision),
        )
        if (loss := evaluator.held_out_loss()) is not None:
            metrics["held_out_loss"] = loss
        if min(len(prompts), len(real)) < 2:
            continue  # a distance between distributions needs two of each
        made = evaluator.sample()
        # at most half: a subset of everything is the same every time, and its spread would read 0
        size = min(KID_SUBSET, max(2, min(len(made), len(real)) // 2))
        distance = kid(made, real, subset_size=size, subsets=KID_SUBSETS, seed=config.seed, extractor=extractor)
        metrics |= {f"kid_{name}": distance.mean, f"kid_{name}_std": distance.std, f"kid_{name}_images": len(made)}
    return metrics


def _held_out(config: TrainConfig, dataset: Dataset, encoder: Encoder) -> HeldOut | None:
    """The pictures that training measured."""
    ids = spread(len(dataset.split("held_out")), config.evaluation.held_out_images)
    return held_out_of(config, dataset, ids, _told(config, dataset, "held_out", encoder, ids)) if ids else None


def _told(
    config: TrainConfig, dataset: Dataset, name: SplitName, encoder: Encoder, sample_ids: Sequence[int]
) -> Conditioning:
    """What the network is told about samples: their captions, or the classes that were looked up for training."""
    if isinstance(config.conditioning, CaptionsConfig):
        split = dataset.split(name)
        return encoder.encode([read_caption(split, sample_id) for sample_id in sample_ids])
    return open_states(dataset, name, config.conditioning).rows(sample_ids)
