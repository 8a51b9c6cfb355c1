"""The fork server's task that looks ahead at a run: it has torch imported, and the command line has not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training import device, forecast
from training.config import parse
from training.spec import Emit


def main(spec: Mapping[str, Any], emit: Emit) -> None:
    """Emit ``forecast``.

    Args:
        spec: ``config`` is the recipe; ``gpu`` the name of the cluster's GPUs, None for its CPUs; ``memory_bytes``
            what one worker may take, None where it is not known; ``runs`` the folder of earlier runs.
        emit: takes the event.

    Raises:
        ConfigError: the recipe does not fit; the message says what would.
    """
    config = parse(spec["config"])
    precision = device.precision_on(config, spec["gpu"])
    if spec["gpu"] is None:
        on = device.of_cpu(config.workers.threads, precision, spec["memory_bytes"])
    else:
        on = device.of_gpu(spec["gpu"], precision, spec["memory_bytes"])
    emit({"event": "forecast", **asdict(forecast.make(config, on, precision, Path(spec["runs"])))})
