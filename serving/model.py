"""The model that a replica serves: from the registry or a directory to a denoiser in memory."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from serving.config import PinnedModel, ServeConfig
from serving.errors import ServeError
from serving.sizes import Sizes, sizes_of
from training.bundle import MANIFEST, load_bundle, manifest_sha256

if TYPE_CHECKING:
    import torch

    from serving.adapters import Adapters
    from serving.engine import Engine
    from serving.observer import Observer
    from serving.prompt_cache import Encoder
    from training.bundle import LoadedBundle
    from training.canvas import Canvas
    from training.objectives import Denoiser


@dataclass(frozen=True)
class ModelCard:
    """What clients are told about the model.

    Attributes:
        name: what a request's ``model`` says.
        version: the registry's version; None for a directory.
        resolution: side of its square images, in pixels.
        created: when its training ended, seconds since 1970.
        bundle_sha256: of its ``darkroom.json``: equal values mean equal weights.
        run_id: the MLflow run that trained it, where known.
        data_hash: the data set that it learned from, where known.
        made: which sizes it can make; None is its resolution alone.
        adapters: LoRAs that requests may name.
    """

    name: str
    version: int | None
    resolution: int
    created: int
    bundle_sha256: str
    run_id: str | None = None
    data_hash: str | None = None
    made: Sizes | None = None
    adapters: tuple[str, ...] = ()

    @property
    def sizes(self) -> Sizes:
        """What it can make."""
        return self.made or Sizes.only(self.resolution)

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
        grid: the times of so many steps, as its objective gives them.
        canvas: where it draws: pixels, or latents.
        adapters: LoRAs beside it.
        device: where its weights are.
    """

    card: ModelCard
    denoiser: Denoiser
    encoder: Encoder
    grid: Callable[[int], torch.Tensor]
    canvas: Canvas
    adapters: Adapters
    device: str = "cpu"

    def engine(self, config: ServeConfig, observer: Observer) -> Engine:
        """The engine that runs it; not started yet.

        Args:
            config: the deployment's.
            observer: told of everything that happens to requests.
        """
        from serving.engine import Engine
        from serving.warming import device_name
        from serving.width_store import WidthStore

        told = config.speed.model_dump_json(include={"compiled", "cuda_graphs", "bf16"})
        told += config.batch.model_dump_json(include={"max_batch_rows", "width_tolerance"})
        place = Path(config.cache).expanduser().with_name("widths")
        widths = WidthStore(place, self.card.bundle_sha256, device_name(self.device), told)
        return Engine(
            self.denoiser,
            self.encoder,
            canvas=self.canvas,
            config=config.batch,
            grid=self.grid,
            sizes=self.card.sizes,
            speed=config.speed,
            adapters=self.adapters,
            widths=widths,
            observer=observer,
            device=self.device,
        )


def pinned(config: ServeConfig) -> ServeConfig:
    """The same config with the weights fixed: a directory made absolute, an alias turned into a version, a checksum.

    All replicas of a deployment then run the same weights, also those that start after the alias has moved or the
    directory was written again; and a deployment of other weights differs in its settings, so that Serve acts on it.

    Raises:
        CheckpointError: the bundle disappears meanwhile.
        ServeError: neither a bundle's directory nor a reference that a registry could know.
        RegistryError, TrackingError: the registry does not know the model or cannot be reached.
    """
    directory = Path(config.model).expanduser()
    places, sums = _pinned_adapters(config)
    if (directory / MANIFEST).is_file():
        directory = directory.resolve()
        model = PinnedModel(name=directory.name, version=None, sha256=manifest_sha256(directory), adapters=sums)
        return config.model_copy(update={"model": str(directory), "pinned": model, "adapters": places})
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
    model = PinnedModel(name=version.name, version=version.version, sha256=version.bundle_sha256, adapters=sums)
    update = {"model": model.label, "pinned": model, "tracking_uri": uri, "adapters": places}
    return config.model_copy(update=update)


def _pinned_adapters(config: ServeConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Where each adapter's file is, absolute, and its checksum.

    Raises:
        ServeError: one is not there.
    """
    from serving.adapters import adapter_path

    places = {name: adapter_path(name, place) for name, place in config.adapters.items()}
    sums = {name: hashlib.sha256(place.read_bytes()).hexdigest() for name, place in places.items()}
    return {name: str(place) for name, place in places.items()}, sums


def load_model(config: ServeConfig) -> ServedModel:
    """Load what a pinned config names; the registry is asked only for a bundle that the cache does not hold.

    Raises:
        ServeError: the config is not pinned, or its directory holds other weights by now.
        DarkroomError: the registry or the bundle refuses.
    """
    model = config.pinned
    if model is None:
        raise ServeError("The model is not pinned.", value=config.model, rule="what serving.model.pinned returns")
    directory = Path(config.model) if model.version is None else _fetched(config, model, model.version)
    bundle = load_bundle(directory)
    if bundle.sha256 != model.sha256:
        raise ServeError(
            "The bundle has changed since it was deployed.",
            value=str(directory),
            rule=f"a {MANIFEST} with sha256 {model.sha256}: all replicas of a deployment run the same weights",
            mend=f"darkroom serve {directory}",
        )
    return _served(bundle.on("cuda" if config.replica_gpus else "cpu"), model, config)


def _served(bundle: LoadedBundle, model: PinnedModel, config: ServeConfig) -> ServedModel:
    """A bundle on its device, with its adapters and the switches that are on."""
    from serving.adapters import Adapters
    from serving.fast_network import fast_network

    device = "cuda" if config.replica_gpus else "cpu"
    adapters = Adapters(bundle.module, {name: Path(place) for name, place in config.adapters.items()})
    if _pinned_adapters(config)[1] != model.adapters:
        raise ServeError(
            "An adapter has changed since it was deployed.",
            value=", ".join(config.adapters),
            rule="the files that were pinned: all replicas of a deployment run the same weights",
            mend="deploy again",
        )
    network = fast_network(bundle.module, config.speed, device=device, variant=lambda: adapters.active)
    canvas = bundle.canvas
    card = ModelCard(
        name=model.name,
        version=model.version,
        resolution=canvas.resolution,
        created=int(datetime.fromisoformat(bundle.provenance.created_utc).timestamp()),
        bundle_sha256=bundle.sha256,
        run_id=bundle.provenance.run_id,
        data_hash=bundle.provenance.data_hash,
        made=sizes_of(bundle, config.limits.max_pixels),
        adapters=adapters.names,
    )
    denoiser = bundle.objective.denoiser(network)
    return ServedModel(card, denoiser, bundle.encoder, bundle.objective.grid, canvas, adapters, device)


def _fetched(config: ServeConfig, model: PinnedModel, version: int) -> Path:
    """The registered bundle on this machine; what the cache is asked for is known without the registry."""
    from training.registry import ModelVersion, fetch

    wanted = ModelVersion(
        name=model.name,
        version=version,
        run_id="",
        aliases=(),
        data_hash="",
        metrics={},
        created_utc="",
        bundle_sha256=model.sha256,
    )
    return fetch(str(config.tracking_uri), wanted, Path(config.cache).expanduser())
