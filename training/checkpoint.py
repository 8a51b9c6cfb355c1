"""Checkpoints: whole or absent, checked, and readable without running anything from them.

A checkpoint is a folder ``step-00000120`` with safetensors files and ``checkpoint.json``, which carries every
file's sha256 and is written last, inside a folder that gets its name only when everything is on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from training.errors import CheckpointError

if TYPE_CHECKING:
    import torch

MANIFEST = "checkpoint.json"
SCHEMA = 1


class CheckpointConfig(BaseModel):
    """When the run's state is kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    every_steps: int = Field(default=100, ge=1)
    """Steps between two checkpoints; the last step and an interruption are always kept."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest are kept."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        position: samples consumed of the global stream; with it the loader goes on.
        about: config, code version, data hash and whatever else the run recorded.
    """

    path: Path
    step: int
    position: int
    about: Mapping[str, Any]

    def load(self, group: str) -> dict[str, torch.Tensor]:
        """One group of tensors, e.g. ``"weights"``, ``"ema"`` or ``"optimizer"``."""
        from safetensors.torch import load_file

        return load_file(self.path / f"{group}.safetensors")


def save(
    folder: Path,
    *,
    step: int,
    position: int,
    groups: Mapping[str, Mapping[str, torch.Tensor]],
    about: Mapping[str, Any],
    keep: int,
) -> Checkpoint:
    """Write a checkpoint and remove those that it replaces: all but ``keep``, and any of a later step.

    The folder appears under its name only when every byte is on disk; a crash at any moment leaves the older
    checkpoints as they were, and what it left half-written is removed by the next save. One writer at a time.
    """
    from safetensors.torch import save_file

    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _flush(folder.parent)
    for orphan in folder.glob("partial-*"):
        shutil.rmtree(orphan)
    partial = folder / f"partial-{step:08d}"
    partial.mkdir()
    files = {}
    for group, tensors in groups.items():
        path = partial / f"{group}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        files[path.name] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
        _flush(path)
    manifest = {"schema": SCHEMA, "step": step, "position": position, "files": files, "about": dict(about)}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
    _flush(partial / MANIFEST)
    _flush(partial)
    final = folder / f"step-{step:08d}"
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _flush(folder)
    # a later step is damaged, or of a future that this run has left: it went on from an earlier one
    here = _folders(folder)
    place = here.index(final)
    for old in here[:place] + here[place + keep :]:
        shutil.rmtree(old)
    return Checkpoint(final, step, position, dict(about))


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and why newer ones were passed over."""
    refused: list[str] = []
    for path in _folders(folder):
        try:
            return read(path), refused
        except CheckpointError as error:
            refused.append(str(error))
    return None, refused


def read(path: Path) -> Checkpoint:
    """A checkpoint whose every file has the recorded size and sha256.

    Raises:
        CheckpointError: a part is missing or altered; the message names it.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError("The checkpoint's manifest cannot be read.", value=str(path / MANIFEST)) from None
    for name, expected in files.items():
        part = path / Path(name).name
        if not part.is_file() or part.stat().st_size != expected["bytes"] or _sha256(part) != expected["sha256"]:
            raise CheckpointError(
                f"The checkpoint is damaged: {name} is missing or altered.",
                value=str(part),
                rule=f"{expected['bytes']} bytes with sha256 {expected['sha256'][:12]}...",
            )
    return Checkpoint(path, int(manifest["step"]), int(manifest["position"]), manifest["about"])


def _folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(named, key=lambda path: int(path.name[5:]), reverse=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
