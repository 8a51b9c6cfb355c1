"""What a rank measures about a run while it trains: where time goes, MFU, cost, and how the forecast has done."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import torch

from training import cost, energy, flops, forecast, ranks
from training.config import TrainConfig
from training.device import CUDA_BYTES
from training.spec import Emit, WorkerSpec
from training.stopwatch import Stopwatch

EVERY_STEPS = 10
"""Steps over which times are averaged: the charts keep their shape, and the server a tenth of the points."""
WARMUP_STEPS = 3
"""The first steps of a process, which the rate leaves out: kernels are chosen and memory is taken."""
WAIT_S = 1.0
"""How long the end of a run waits for the last look at the energy."""

Log = Callable[[int, Mapping[str, float]], None]


class RunMeter:
    """Measures inside ``with``; ends with an event ``account``. Every rank has one, at the same time.

    Args:
        config: the recipe.
        spec: of this process.
        device: that it computes on.
        clock: times the steps.
        done: steps done before.
        emit: takes the account.
        log: takes metrics of a step, on rank 0.
    """

    def __init__(
        self,
        config: TrainConfig,
        spec: WorkerSpec,
        device: torch.device,
        clock: Stopwatch,
        done: int,
        emit: Emit,
        log: Log,
    ) -> None:
        self._config, self._spec, self._device, self._clock = config, spec, device, clock
        self._emit, self._log = emit, log
        self._run_dir = Path(spec.run_dir)
        self._done = self._first = self._lapped = done
        self._step_s = 0.0
        self._forecast = forecast.read(self._run_dir) if spec.rank == 0 else None
        self._attempt: cost.AttemptFile | None = None
        self._energy: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RunMeter:
        workers, world = self._config.workers, self._spec.world
        if self._spec.rank == 0:
            self._attempt = cost.AttemptFile(self._run_dir, workers.cpus * world, workers.gpus * world)
        hosts = ranks.gather(socket.gethostname())
        if self._config.cost.energy and self._spec.rank == hosts.index(socket.gethostname()):
            here = hosts.count(socket.gethostname())
            self._energy = _start_energy(self._config, cost.energy_file(self._run_dir, self._spec.rank), here)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._energy is not None and self._energy.stdin is not None:
            self._energy.stdin.close()
            try:
                self._energy.wait(WAIT_S)
            except subprocess.TimeoutExpired:
                self._energy = None  # it writes its last word a moment later
        if self._attempt is not None:
            self._attempt.write()
            if kind is None and self._done > self._first:
                self._account()

    def on_step(self, done: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Take note of a step; returns its metrics and what they show."""
        told = dict(metrics)
        self._done = done
        if done - self._first > WARMUP_STEPS:
            self._step_s += self._config.global_batch / metrics["images_per_s"]
        if self._attempt is not None:
            per_image = self._forecast.flops_per_image if self._forecast else 0
            self._attempt.add(float(per_image) * self._config.global_batch)
        if done == self._first + 1 or done % EVERY_STEPS == 0:
            steps = done - self._lapped
            self._lapped = done
            told |= {f"time/{name}_s": seconds / steps for name, seconds in self._clock.lap().items()}
            share = self._mfu(metrics["images_per_s"])
            told |= {} if share is None else {"mfu": share}
        return told

    def on_evaluation(self, done: int) -> None:
        """Tell what the run has cost so far."""
        if self._spec.rank == 0:
            used = cost.total(self._run_dir, self._config.cost)
            self._log(done, used.metrics(done * self._config.global_batch))

    def _images_per_s(self) -> float | None:
        rated = self._done - self._first - WARMUP_STEPS
        return rated * self._config.global_batch / self._step_s if rated > 0 else None

    def _mfu(self, images_per_s: float) -> float | None:
        if self._forecast is None:
            return None
        peak = self._forecast.peak_flops
        if self._device.type == "cuda":
            peak = flops.gpu_peak(torch.cuda.get_device_name(self._device), self._forecast.precision)
        if not peak:
            return None
        return flops.mfu(self._forecast.flops_per_image, images_per_s, peak * self._spec.world)

    def _account(self) -> None:
        """Compare with the forecast, keep what was measured for later ones, and tell the user."""
        used = cost.total(self._run_dir, self._config.cost)
        images = self._done * self._config.global_batch
        told = used.metrics(images)
        actual = self._actual(used, images)
        if actual is not None:
            forecast.write(self._run_dir / forecast.ACTUAL, actual)
            told |= compared(self._forecast, actual, self._config, used)
        self._log(self._done, told)
        totals = self._clock.totals(wait=True)
        self._emit(
            {
                "event": "account",
                "steps": self._done - self._first,
                "time_s": totals,
                "metrics": told,
                "currency": self._config.cost.currency,
            }
        )

    def _actual(self, used: cost.Cost, images: int) -> forecast.Actual | None:
        rate = self._images_per_s()
        if rate is None or self._forecast is None:
            return None
        return forecast.Actual(
            key=self._forecast.key,
            images_per_s=rate,
            memory_bytes=_peak_memory_bytes(self._device),
            seconds=images / rate,
            energy_kwh=used.energy_kwh,
            images=images,
        )


def compared(
    told: forecast.Forecast | None, actual: forecast.Actual, config: TrainConfig, used: cost.Cost
) -> dict[str, float]:
    """The forecast, what came, and the second over the first."""
    if told is None:
        return {}
    hours = told.world * actual.seconds / 3600
    came: dict[str, float | None] = {
        "memory_bytes": actual.memory_bytes,
        "images_per_s": actual.images_per_s,
        "seconds": actual.seconds,
        "gpu_hours": hours * config.workers.gpus,
        "cpu_hours": hours * config.workers.cpus,
        "energy_kwh": used.energy_kwh,
        "money": used.money,
    }
    metrics = told.metrics()
    for name, value in came.items():
        expected = metrics.get(f"forecast/{name}")
        # of a run that was interrupted, only what does not grow with the steps compares
        if value is not None and (actual.images == told.images or name in ("memory_bytes", "images_per_s")):
            metrics[f"actual/{name}"] = float(value)
            if expected:
                metrics[f"actual_over_forecast/{name}"] = value / expected
    return metrics


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device)) + CUDA_BYTES
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _start_energy(config: TrainConfig, out: Path, workers_here: int) -> subprocess.Popen[bytes] | None:
    share = min(1.0, config.workers.cpus * workers_here / (os.cpu_count() or 1))
    gpus = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    try:
        return energy.start(out, config.cost.country, gpus if config.workers.gpus else (), share)
    except OSError:  # no process to be had: a run does not fail for an estimate
        return None
