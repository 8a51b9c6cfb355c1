"""What a run has cost so far: hours, FLOPs, energy, CO2 and money, over all of its attempts.

Every attempt of the run writes a file of its own in ``RUN/cost``, rewritten while it lasts, so that what a killed
attempt used is counted to the second, and nothing twice.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from training import energy
from training.cost_config import CostConfig

FOLDER = "cost"
EVERY_S = 1.0
"""How often an attempt's file is written anew."""


@dataclass(frozen=True)
class Attempt:
    """What one group of training processes used.

    Attributes:
        seconds: that it lasted.
        cpus: reserved, over all workers.
        gpus: the same.
        steps: taken, those included that were done again later.
        flops: of these steps' forwards and backwards; 0 where they are not known.
    """

    seconds: float
    cpus: float
    gpus: float
    steps: int
    flops: float


@dataclass(frozen=True)
class Cost:
    """What a run used.

    Attributes:
        attempts: groups of training processes.
        seconds: that they lasted, one after the other.
        gpu_hours: of reserved GPUs, busy or not.
        cpu_hours: of reserved CPUs.
        flops: of forwards and backwards; 0 where they are not known.
        energy_kwh: None where nothing was measured.
        co2_kg: the same.
        money: in the recipe's currency; None without prices.
    """

    attempts: int
    seconds: float
    gpu_hours: float
    cpu_hours: float
    flops: float
    energy_kwh: float | None
    co2_kg: float | None
    money: float | None

    def metrics(self, images: int) -> dict[str, float]:
        """For MLflow: the run's, and for each 1,000 images that it has consumed.

        Args:
            images: consumed, each step counted once.
        """
        rated = {f"cost/{name}_per_1000_images": value for name, value in self.per_1000(images).items()}
        return {f"cost/{name}": value for name, value in self._known().items()} | rated

    def per_1000(self, images: int) -> dict[str, float]:
        """What 1,000 of so many images have used."""
        known = self._known()
        return {name: 1000 * value / images for name, value in known.items() if images and name != "attempts"}

    def _known(self) -> dict[str, float]:
        told = {name: float(value) for name, value in asdict(self).items() if value is not None}
        return {name: value for name, value in told.items() if name != "flops" or value}


class AttemptFile:
    """Writes down what this attempt uses. For rank 0.

    Args:
        run_dir: the run's folder.
        cpus: reserved, over all workers.
        gpus: the same.
    """

    def __init__(self, run_dir: Path, cpus: float, gpus: float) -> None:
        self._began, self._written = time.monotonic(), 0.0
        self._cpus, self._gpus = cpus, gpus
        self.steps, self.flops = 0, 0.0
        self._path = run_dir / FOLDER / f"attempt-{time.time_ns()}-{os.getpid()}.json"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def add(self, flops: float) -> None:
        """Count a step."""
        self.steps, self.flops = self.steps + 1, self.flops + flops
        if time.monotonic() - self._written > EVERY_S:
            self.write()

    def write(self) -> None:
        """Bring the file up to date."""
        self._written = time.monotonic()
        used = Attempt(self._written - self._began, self._cpus, self._gpus, self.steps, self.flops)
        aside = self._path.with_suffix(".partial")
        aside.write_text(json.dumps(asdict(used)))
        aside.replace(self._path)


def energy_file(run_dir: Path, rank: int) -> Path:
    """Where the energy of this attempt goes, of the node whose first rank that is."""
    return run_dir / FOLDER / f"energy-{time.time_ns()}-rank-{rank}.json"


def total(run_dir: Path, config: CostConfig) -> Cost:
    """What a run has used so far, over all attempts and nodes."""
    attempts = [Attempt(**json.loads(path.read_text())) for path in sorted((run_dir / FOLDER).glob("attempt-*.json"))]
    told = [energy.read(path) for path in sorted((run_dir / FOLDER).glob("energy-*.json"))]
    measured = [each for each in told if each is not None]
    cpu_hours = sum(each.seconds * each.cpus for each in attempts) / 3600
    gpu_hours = sum(each.seconds * each.gpus for each in attempts) / 3600
    return Cost(
        attempts=len(attempts),
        seconds=sum(each.seconds for each in attempts),
        gpu_hours=gpu_hours,
        cpu_hours=cpu_hours,
        flops=sum(each.flops for each in attempts),
        energy_kwh=sum(each.kwh for each in measured) if measured else None,
        co2_kg=sum(each.co2_kg for each in measured) if measured else None,
        money=config.money(gpu_hours, cpu_hours),
    )
