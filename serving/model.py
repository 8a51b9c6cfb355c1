"""The model that a replica serves: from the registry or a directory to a denoiser in memory."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast

from serving.config import ServeConfig
from serving.errors import ServeError
from training.bundle import MANIFEST, load_bundle

if TYPE_CHECKING:
    import torch

    from serving.engine import Encoder
    from training.objectives import Denoiser


@dataclass(frozen=True)
class ModelCard:
    """What clients are told about the model.

    Attributes:
        name: what a request's ``model`` says.
        version: the registry's version; None for a directory.
        resolution: side of its square images, in pixels.
        created: when its training ended, seconds since 1970.
        run_id: the MLflow run that trained it, where known.
        data_hash: the data set that it learned from, where known.
    """

    name: str
    version: int | None
    resolution: int
    created: int
    run_id: str | None = None
    data_hash: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Every spelling that a request may use."""
        versioned = () if self.version is None else (f"{self.name}/{self.version}",)
        return (self.name, *versioned)


@dataclass(frozen=True)
class ServedModel:
    """A model ready to denoise.

    Attributes:
        card: what clients are told.
        denoiser: the model behind the contract.
        encoder: prompts to conditioning.
        time_shift: the resolution shift that it was trained with.
        device: where its weights are.
    """

    card: ModelCard
    denoiser: Denoiser
    encoder: Encoder
    time_shift: float = 1.0
    device: str = "cpu"


def pinned(config: ServeConfig) -> ServeConfig:
    """The same config with the model fixed: a directory made absolute, an alias turned into a version.

    All replicas of a deployment then serve one version, also those that start after the alias has moved.

    Raises:
        ServeError: neither a bundle's directory nor a reference that a registry could know.
        RegistryError, TrackingError: the registry does not know the model or cannot be reached.
    """
    directory = Path(config.model).expanduser()
    if (directory / MANIFEST).is_file():
        return config.model_copy(update={"model": str(directory.resolve())})
    uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if directory.exists() or not re.fullmatch(r"[^/@:.][^/@:]*(@[\w.-]+|/\d+)?", config.model) or not uri:
        raise ServeError(
            "There is no such model to serve.",
            value=config.model,
            rule=f"a directory with a {MANIFEST}, or a registered model"
            + ("" if uri else "; no MLflow server is configured, so no registered model can be found"),
            options=["path/to/bundle", "NAME@champion", "NAME/3", "NAME"],
            mend="darkroom models list",
        )
    from training.registry import resolve

    version = resolve(uri, config.model)
    return config.model_copy(update={"model": f"{version.name}/{version.version}", "tracking_uri": uri})


def load_model(config: ServeConfig) -> ServedModel:
    """Load what a pinned config names.

    Raises:
        ServeError: no such model.
        DarkroomError: the registry or the bundle refuses.
    """
    config = pinned(config)
    directory, name, version = Path(config.model), Path(config.model).name, None
    if not directory.is_absolute():
        from training.registry import fetch, resolve

        uri = str(config.tracking_uri)
        registered = resolve(uri, config.model)
        name, version = registered.name, registered.version
        directory = fetch(uri, registered, Path(config.cache).expanduser())
    bundle = load_bundle(directory)
    device = "cuda" if config.replica_gpus else "cpu"
    cast("torch.nn.Module", bundle.unet).to(device)
    card = ModelCard(
        name=name,
        version=version,
        resolution=bundle.resolution,
        created=int(datetime.fromisoformat(bundle.provenance.created_utc).timestamp()),
        run_id=bundle.provenance.run_id,
        data_hash=bundle.provenance.data_hash,
    )
    return ServedModel(card, bundle.denoiser, bundle.encoder, bundle.time_shift, device)
