"""A finished run becomes a measured bundle in the registry. Runs in a process of its own, like a training rank."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from training import checkpoint, parallel
from training.bundle import Provenance, write_bundle
from training.conditioning import Conditioning, TextEncoder
from training.config import TrainConfig, parse
from training.data.dataset import Dataset
from training.errors import CheckpointError
from training.evaluate.evaluator import Evaluator, read_split
from training.evaluate.features import EfficientNetFeatures
from training.evaluate.kid import kid
from training.precision import resolve

KID_SUBSETS = 50
KID_SUBSET = 100


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

    Emits a ``published`` event with the model's name and version.

    Raises:
        CheckpointError: the run has not come to its end.
        DataError: its data set is gone.
        TrackingError: the MLflow server cannot be reached.
        RegistryError: it refuses the model.
    """
    from training import registry

    spec = PublishSpec(**values)
    config, run_dir = parse(spec.config), Path(spec.run_dir)
    found = _finished(config, run_dir)
    run_id = json.loads((run_dir / "mlflow_run.json").read_text())["run_id"]
    torch.set_num_threads(max(config.workers.threads, config.workers.count))
    parallel.connect(0, 0, 1, "127.0.0.1", 0)
    dataset = Dataset.open(config.data.path)
    encoder = TextEncoder.from_config(config.text)
    network = config.model.build(encoder.width)
    network.load_state_dict({name.removeprefix("network."): value for name, value in found.load("ema").items()})
    emit({"event": "stage", "message": "measuring the held-out loss and the kernel distance"})
    metrics = _measure(config, dataset, encoder, network, spec.images)
    licences = dict(dataset.manifest.licences)
    provenance = Provenance(
        run_id=run_id,
        data_hash=dataset.hash,
        recipe=config.model_dump(mode="json"),
        metrics=metrics,
        licences=licences,
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        step=found.step,
        code_version=found.about["code"].get("mlflow.source.git.commit", "unknown"),
    )
    emit({"event": "stage", "message": "writing and registering the bundle"})
    shift = config.objective.time_shift
    bundle = write_bundle(run_dir / "bundle", unet=network, encoder=encoder, time_shift=shift, provenance=provenance)
    version = registry.publish(spec.tracking_uri, bundle, name=config.name, run_id=run_id)
    emit({"event": "published", "name": version.name, "version": version.version, "metrics": metrics})
    dist.destroy_process_group()


def _finished(config: TrainConfig, run_dir: Path) -> checkpoint.Checkpoint:
    found, _ = checkpoint.newest(run_dir / "checkpoints")
    if found is None or found.step < config.steps:
        raise CheckpointError(
            "The run has not come to its end.",
            value=f"step {found.step if found else 0}",
            rule=f"{config.steps} steps",
            mend="the same `darkroom train` command again goes on",
        )
    return found


def _measure(
    config: TrainConfig, dataset: Dataset, encoder: TextEncoder, network: Any, images: int
) -> dict[str, float]:
    """Held-out loss, and the kernel distance to held-out and to training pictures."""
    metrics: dict[str, float] = {}
    extractor = EfficientNetFeatures()
    for name in ("held_out", "train"):
        split = dataset.split("held_out" if name == "held_out" else "train")
        if len(split) < 2:
            continue
        count = min(images // 2, len(split))
        prompts = [split.caption(i * len(split) // count) for i in range(count)]
        real, readable = read_split(split, config.model.resolution)
        states = encoder.encode(["", *prompts])
        held_out = encoder.encode([split.caption(i) for i in readable.tolist()]) if name == "held_out" else None
        evaluator = Evaluator(
            network,
            config.objective,
            config.evaluation,
            seed=config.seed,
            images=real,
            held_out=held_out or Conditioning(states.tokens[:0], states.mask[:0]),
            prompts=prompts,
            prompt_states=states.rows(slice(1, None)),
            unconditional=states.rows(slice(0, 1)),
            device="cuda" if torch.cuda.is_available() else "cpu",
            precision=resolve(config.engine.precision),
        )
        if held_out is not None and (loss := evaluator.held_out_loss()) is not None:
            metrics["held_out_loss"] = loss
        made = evaluator.sample()
        whole = ((real + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        # at most half: a subset of everything is the same every time, and its spread would read 0
        size = min(KID_SUBSET, max(2, min(len(made), len(whole)) // 2))
        distance = kid(made, whole, subset_size=size, subsets=KID_SUBSETS, seed=config.seed, extractor=extractor)
        metrics |= {f"kid_{name}": distance.mean, f"kid_{name}_std": distance.std, f"kid_{name}_images": len(made)}
    return metrics
