"""Optimizer state on a local disk: tensors whose memory is a mapped file.

The kernel writes them out where memory is short and reads them back when the optimizer comes by, in the order in which
it steps them (the idea of Rajbhandari et al. 2021, ZeRO-Infinity, section 5.2). They are tensors like all others: their
parts are views, so that checkpoints, resuming and other world sizes notice nothing. DeepSpeed's own way to a disk
leaves nothing between two steps that could be read, works at stage 3 alone, and needs libaio.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import torch

from training.errors import ConfigError


class Disk:
    """Gives memory in files that nobody else sees, and that vanish with the process.

    Args:
        folder: on a local disk; made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def moved(self, values: torch.Tensor) -> torch.Tensor:
        """The values, in a file.

        Raises:
            ConfigError: the folder cannot be used, or has no room.
        """
        size = values.numel() * values.element_size()
        if not size:
            return values
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)  # no later store finds none
                memory = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise ConfigError(
                "The optimizer's state finds no place on the disk.",
                value=str(self._folder),
                rule=f"{size} bytes in a folder of a local disk: {error.strerror}",
                options=["another engine.offload_path", "engine.offload cpu"],
            ) from error
        tensor = torch.frombuffer(memory, dtype=values.dtype).view(values.shape)
        return tensor.copy_(values.detach())
