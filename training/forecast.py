"""What a run will take, told before it begins: memory, time, energy and money."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.config import TrainConfig
from training.errors import DarkroomError

if TYPE_CHECKING:
    from training.conditioning import ConditioningShape
    from training.memory_forecast import Device

FILE = "forecast.json"
ACTUAL = "actual.json"
ASSUMED_MFU = {True: 0.35, False: 0.25}
"""The share of a device's FLOP/s that training is taken to reach where nothing was measured: on a GPU, on a CPU."""
CLASSES = 1000
"""That a network is taken to be told where the data set is not at hand."""
_SHAPING = ("model", "latents", "conditioning", "objective", "optimizer", "global_batch", "engine", "workers")


@dataclass(frozen=True)
class Forecast:
    """What a run is expected to take; JSON.

    Attributes:
        key: equal for runs that go equally fast.
        device: what a worker computes on.
        world: workers.
        precision: of the matrix products.
        parameters: of the network.
        flops_per_image: of forward and backward.
        images: of all steps.
        peak_flops: FLOP/s of one worker's device at most; None where it is not known.
        memory: bytes on one worker's device, by part.
        memory_bytes: their sum.
        capacity_bytes: that the device has for the worker; None where it is not known.
        images_per_s: of all workers; None where neither an earlier run nor the device says it.
        rate_from: what it was told from.
        seconds: of all steps, without start, evaluations and checkpoints.
        flops: of all steps.
        gpu_hours: of reserved GPUs.
        cpu_hours: of reserved CPUs.
        energy_kwh: by an earlier run's; None without one.
        money: in ``currency``; None without prices.
        currency: of the recipe's prices.
    """

    key: str
    device: str
    world: int
    precision: str
    parameters: int
    flops_per_image: int
    images: int
    peak_flops: float | None
    memory: Mapping[str, int]
    memory_bytes: int
    capacity_bytes: int | None
    images_per_s: float | None
    rate_from: str
    seconds: float | None
    flops: float
    gpu_hours: float | None
    cpu_hours: float | None
    energy_kwh: float | None
    money: float | None
    currency: str

    def metrics(self) -> dict[str, float]:
        """For MLflow, beside the actual ones."""
        names = ("memory_bytes", "images_per_s", "seconds", "gpu_hours", "cpu_hours", "energy_kwh", "money")
        told = {name: getattr(self, name) for name in names}
        return {f"forecast/{name}": float(value) for name, value in told.items() if value is not None}


@dataclass(frozen=True)
class Actual:
    """What a run has measured, in ``RUN/actual.json``.

    Attributes:
        key: as the forecast's.
        images_per_s: of steps alone, the first few left out.
        memory_bytes: the most that a worker's device held.
        seconds: of all steps.
        energy_kwh: of them; None where it was not measured.
        images: consumed.
    """

    key: str
    images_per_s: float
    memory_bytes: int
    seconds: float
    energy_kwh: float | None
    images: int


def key_of(config: TrainConfig, device: str) -> str:
    """Names runs that go equally fast."""
    told = config.model_dump(mode="json", include=set(_SHAPING))
    told["buckets"] = config.data.buckets.model_dump(mode="json")
    return hashlib.sha256(json.dumps([device, told], sort_keys=True).encode()).hexdigest()[:16]


def told_shape(config: TrainConfig) -> ConditioningShape:
    """Of what a recipe's network is told; without its data set, as many classes as ImageNet has."""
    from training.conditioning import ClassConfig, ConditioningShape, NothingConfig, encoder_shape
    from training.conditioning.encoder import captions_shape
    from training.data.dataset import Dataset, is_dataset

    if isinstance(config.conditioning, NothingConfig):
        return ConditioningShape("none")
    if not isinstance(config.conditioning, ClassConfig):
        return captions_shape(config.conditioning)
    if config.data.path and is_dataset(config.data.path):
        with contextlib.suppress(DarkroomError):  # its classes were not looked up yet: the run does that
            return encoder_shape(config.conditioning, Dataset.open(config.data.path, config.data.disk_cache))
    return ConditioningShape("class", classes=CLASSES)


def make(config: TrainConfig, device: Device, precision: str, runs: Path | None = None) -> Forecast:
    """Look ahead.

    Args:
        config: the recipe.
        device: of one worker.
        precision: of the matrix products there.
        runs: folder of earlier runs, one of which may have been measured.

    Raises:
        ConfigError: the recipe does not fit the device; the message says what would.
    """
    from training import footprint, memory_forecast

    world = config.workers.largest
    told = told_shape(config)
    found = footprint.measure(config, told, precision)
    fewest = config.workers.smallest  # each of them holds the most
    memory_forecast.require_room(config, found, fewest, device, lambda other: footprint.measure(other, told, precision))
    memory = memory_forecast.forecast(config, found, world, device)
    images, key = config.steps * config.global_batch, key_of(config, device.name)
    earlier = measured(runs, key) if runs else None
    rate, rate_from, per_image = None, "unknown", None
    if earlier is not None:
        rate, rate_from = earlier.images_per_s, "an earlier run of this recipe"
        per_image = None if earlier.energy_kwh is None else earlier.energy_kwh / earlier.images
    elif device.peak_flops:
        share = ASSUMED_MFU[device.is_gpu]
        rate, rate_from = share * world * device.peak_flops / found.flops_per_image, f"an assumed MFU of {share:.0%}"
    seconds = None if rate is None else images / rate
    hours = None if seconds is None else world * seconds / 3600
    gpu_hours = None if hours is None else hours * config.workers.gpus
    cpu_hours = None if hours is None else hours * config.workers.cpus
    money = None if gpu_hours is None or cpu_hours is None else config.cost.money(gpu_hours, cpu_hours)
    return Forecast(
        key=key,
        device=device.name,
        world=world,
        precision=precision,
        parameters=found.parameters,
        flops_per_image=found.flops_per_image,
        images=images,
        peak_flops=device.peak_flops,
        memory=dict(memory.parts),
        memory_bytes=memory.total_bytes,
        capacity_bytes=device.memory_bytes,
        images_per_s=rate,
        rate_from=rate_from,
        seconds=seconds,
        flops=float(found.flops_per_image) * images,
        gpu_hours=gpu_hours,
        cpu_hours=cpu_hours,
        energy_kwh=None if per_image is None else per_image * images,
        money=money,
        currency=config.cost.currency,
    )


def measured(runs: Path, key: str) -> Actual | None:
    """What the newest run that goes as fast has measured."""
    newest = sorted(runs.glob(f"*/{ACTUAL}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest:
        found: Actual | None = _read(path, Actual)
        if found is not None and found.key == key:
            return found
    return None


def write(path: Path, told: Forecast | Actual) -> None:
    """Keep it beside the run, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(asdict(told), indent=1))
    aside.replace(path)


def read(run_dir: Path) -> Forecast | None:
    """A run's forecast; None where none was made."""
    found: Forecast | None = _read(run_dir / FILE, Forecast)
    return found


def _read(path: Path, kind: Any) -> Any:
    try:
        return kind(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # of an older version, or none: it is made again
        return None
