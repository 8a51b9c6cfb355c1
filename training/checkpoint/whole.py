"""A checkpoint of one process that has every tensor whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from training.checkpoint.config import CheckpointConfig
from training.checkpoint.layout import Layout
from training.checkpoint.slab import Slab
from training.checkpoint.stored import Checkpoint
from training.data.storage import Folder

if TYPE_CHECKING:
    import torch


def save(
    folder: Folder | Path,
    *,
    step: int,
    position: int,
    groups: Mapping[str, Mapping[str, torch.Tensor]],
    about: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
    config: CheckpointConfig | None = None,
) -> Checkpoint:
    """Write a checkpoint and return when it is in storage.

    Args:
        folder: where the run's checkpoints lie.
        step: optimizer steps done.
        position: samples consumed.
        groups: tensors by name, by group.
        about: what the run records.
        metrics: measured at this step.
        config: says which older ones stay.

    Raises:
        StorageError: it cannot be written; older ones are as they were.
    """
    from training.checkpoint.writer import Save, Writer
    from training.engine_state import Part

    parts = [
        Part(group, name, tuple(tensor.shape), 0, tensor.detach().reshape(-1))
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    ]
    layout, order = Layout.of(parts)
    slab = Slab(layout)
    slab.fill([parts[number].values for number in order], {})
    place = folder if isinstance(folder, Folder) else Folder.at(folder)
    writer = Writer(place, config or CheckpointConfig(), uuid4().hex[:8])
    writer.begin(Save(step, position, slab, metrics or {}, about, lambda: None, lambda: None))
    try:
        writer.wait()
    finally:
        writer.close()
    (saved,) = writer.written()
    return saved
