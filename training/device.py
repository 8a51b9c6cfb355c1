"""The device that a worker computes on, as far as this machine or a card's name says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from training.flops import GIB, card, cpu_peak, gpu_peak
from training.memory_forecast import Device

if TYPE_CHECKING:
    from training.config import TrainConfig

CUDA_BYTES = GIB
"""Of a card that CUDA, NCCL and torch's kernels take before there is a network; about, on an H100."""
RUNTIME_BYTES = 150 * 1024**2
"""That a training process takes besides its imports and its network: loader, connections, trackers; measured."""
WITHOUT_BF16 = ("V100", "T4", "P100", "RTX 20", "Quadro RTX")
"""GPUs older than Ampere, for which ``auto`` is fp32."""


def of_gpu(name: str, precision: str, memory_bytes: int | None = None) -> Device:
    """A card.

    Args:
        name: as the driver or Ray tells it.
        precision: of the matrix products.
        memory_bytes: as the driver tells it; None takes the data sheet's.
    """
    known = card(name)
    room = memory_bytes or (int(known.memory_gib * GIB) if known else None)
    return Device(name, room, gpu_peak(name, precision), CUDA_BYTES)


def of_cpu(threads: int, precision: str, memory_bytes: int | None) -> Device:
    """This machine's CPU, which is measured; a process that has torch imported takes as much as this one does now.

    Args:
        threads: of one worker.
        precision: of the matrix products.
        memory_bytes: that one worker may take.
    """
    base = psutil.Process().memory_info().rss + RUNTIME_BYTES
    return Device("CPU", memory_bytes, cpu_peak(threads, precision), base)


def precision_on(config: TrainConfig, gpu: str | None) -> str:
    """What ``auto`` is on a card of this name, or on this machine's CPU."""
    if config.engine.precision != "auto":
        return config.engine.precision
    if gpu is not None:
        return "fp32" if any(name in gpu for name in WITHOUT_BF16) else "bf16"
    from training.precision import has_bf16

    return "bf16" if has_bf16() else "fp32"


def node_memory_bytes() -> int:
    """Of this machine, or of the container that this process is in."""
    machine = int(psutil.virtual_memory().total)
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            return min(machine, int(text))
    return machine
