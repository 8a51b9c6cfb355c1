"""Estimates the energy of a node's share of a run, from a process of its own, so that training never waits for it.

    training process --stdin--> python -m training.energy OUT ...

It leaves when its stdin closes, which a killed training process does as well.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

EVERY_S = 10.0
"""Seconds between two looks at the power, and before the first: a run that ends sooner has no estimate."""
_NICE = 19


@dataclass(frozen=True)
class Energy:
    """What a node has used for a run.

    Attributes:
        seconds: that were measured; earlier ones are taken to have been like them.
        kwh: of its GPUs, and the run's share of its CPU's and memory's.
        co2_kg: that making it emitted.
    """

    seconds: float
    kwh: float
    co2_kg: float


def start(out: Path, country: str | None, gpus: Sequence[str], share: float) -> subprocess.Popen[bytes]:
    """Start the process.

    Args:
        out: JSON of an ``Energy``, replaced at every look.
        country: ISO 3166-1 alpha-3; None for the world's mean.
        gpus: of this node that the run has, as CUDA counts them or by their UUIDs.
        share: of the node's CPU and memory that the run has, 0..1.
    """
    options = ["--share", str(share), "--gpus", ",".join(gpus), *(["--country", country] if country else [])]
    command = [sys.executable, "-m", "training.energy", str(out), *options]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Look at the power until stdin closes."""
    parser = argparse.ArgumentParser(prog="python -m training.energy")
    parser.add_argument("out", type=Path)
    parser.add_argument("--country")
    parser.add_argument("--gpus", default="")
    parser.add_argument("--share", type=float, default=1.0)
    told = parser.parse_args(arguments)
    os.nice(_NICE)
    began = time.monotonic()
    if _over(EVERY_S):  # nothing is imported for a run that ends at once
        return 0
    tracker, handler = _tracker(told.country, [gpu for gpu in told.gpus.split(",") if gpu])
    tracker.start()
    measured = time.monotonic()
    over = False
    while not over:
        over = _over(EVERY_S)
        tracker.flush()
        total = handler.total
        seconds = time.monotonic() - measured
        if total is not None and seconds >= EVERY_S / 2:  # a shorter look says next to nothing of the power
            shared = total.gpu_energy + told.share * (total.cpu_energy + total.ram_energy)
            kwh = shared * (time.monotonic() - began) / max(seconds, 1e-9)
            _write(told.out, Energy(seconds, kwh, kwh * total.emissions / max(total.energy_consumed, 1e-12)))
    return 0


def _over(wait_s: float) -> bool:
    """Whether stdin closes within this time."""
    return bool(select.select([sys.stdin], [], [], wait_s)[0])


def _tracker(country: str | None, gpus: list[str]) -> tuple[Any, Any]:
    """Codecarbon's tracker, which asks no network, and what it tells."""
    from codecarbon import OfflineEmissionsTracker
    from codecarbon.output_methods.base_output import BaseOutput
    from codecarbon.output_methods.emissions_data import EmissionsData

    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)  # it says much before it reads its own option

    class Kept(BaseOutput):
        total: EmissionsData | None = None

        def out(self, total: EmissionsData, delta: EmissionsData) -> None:  # noqa: ARG002  codecarbon's signature
            self.total = total

        live_out = out

    kept = Kept()
    tracker = OfflineEmissionsTracker(
        # the table has no such country, and codecarbon then takes the world's mean
        country_iso_code=country or "WLD",
        measure_power_secs=EVERY_S,
        gpu_ids=gpus or None,
        save_to_file=False,
        output_handlers=[kept],
        allow_multiple_runs=True,
        log_level="critical",
    )
    return tracker, kept


def _write(path: Path, energy: Energy) -> None:
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(asdict(energy)))
    aside.replace(path)


def read(path: Path) -> Energy | None:
    """What a node has told; None before its first word."""
    try:
        return Energy(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # replaced as a whole, so it is not there yet
        return None


if __name__ == "__main__":
    sys.exit(main())
