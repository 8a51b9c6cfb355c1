"""From a recipe's ``latents`` section to what encodes them and to where the network draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.canvas import Canvas
from training.config import TrainConfig
from training.data.dataset import Dataset
from training.data.encoded.latent_reader import LatentReader, require_cacheable
from training.data.encoded.latents import LatentsJob
from training.data.loader import Loader
from training.data.schedule import Schedule
from training.errors import ConfigError
from training.fit import require_fitting


def latents_job(config: TrainConfig) -> LatentsJob | None:
    """The encoding of a run's pictures; None where the network sees pixels.

    Raises:
        ConfigError: the pictures are varied in ways that cannot be kept.
    """
    if config.latents is None:
        return None
    require_cacheable(config.data.augment)
    return LatentsJob(
        config.latents,
        config.model.resolution,
        buckets=config.data.buckets,
        fewest=config.global_batch,
        flips=config.data.augment.flip > 0,
        scaled=config.data.scaled_decoding,
    )


def canvas_of(config: TrainConfig) -> Canvas:
    """Where a recipe's network draws.

    Raises:
        ConfigError: the autoencoder is not there, or gives latents of sides that the network does not take.
    """
    if config.latents is None:
        return Canvas(config.model.resolution)
    canvas = Canvas(config.model.resolution, Path(config.latents.autoencoder))
    try:
        require_fitting(config.model, config.conditioning.kind, config.data.buckets, factor=canvas.factor)
    except ValueError as error:
        raise ConfigError(
            "The network does not take the autoencoder's latents.",
            value=f"resolution {config.model.resolution}, {canvas.factor} pixels of a side for one value",
            rule=str(error),
        ) from error
    return canvas


def open_loader(config: TrainConfig, dataset: Dataset, rank: int, world: int) -> Loader:
    """A rank's loader of what the network sees of the training split: pixels, or kept latents.

    Raises:
        DataError: the split is empty.
        ConfigError: the global batch cannot be shared, or the pictures are varied in ways that cannot be kept.
        StorageError: the lists of the buckets cannot be written.
    """
    sizes: dict[str, Any] = {
        "resolution": config.model.resolution,
        "global_batch": config.global_batch,
        "seed": config.seed,
    }
    job = latents_job(config)
    if job is None:
        return Loader.open(dataset, config.data, **sizes, rank=rank, world=world)
    schedule = Schedule.open(dataset, config.data, **sizes)
    reader = LatentReader.open(dataset, "train", job, config.data.augment, seed=config.seed)
    return Loader(schedule, reader, rank=rank, world=world, prefetch=config.data.prefetch, threads=config.data.threads)
