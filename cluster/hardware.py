"""What this machine has, found without importing torch."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies in bf16 itself; without, training computes in fp32."""
    facts = Path("/proc/cpuinfo")
    words = facts.read_text().split() if facts.is_file() else []
    return any(word.endswith("bf16") for word in words)


def gpus() -> list[str]:
    """The names of the NVIDIA GPUs that the driver shows; none without the package that asks it."""
    if importlib.util.find_spec("pynvml") is None:  # `darkroom doctor`, which names what is missing, comes by here
        return []
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [
            pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())
        ]
    finally:
        pynvml.nvmlShutdown()
