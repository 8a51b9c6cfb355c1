"""The keyed random numbers: the only source of randomness in training, augmentation and sampling.

A draw is named by what it is for, never by when or where it happens. One worker or sixty-four, interrupted or
not, a sample is trained with the same timestep, noise and caption dropout; a served picture depends on its own
seed alone.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # the order of the data is drawn without torch
    import torch


def generator(seed: int, *key: int | str) -> np.random.Generator:
    """A counter-based generator for one purpose.

    Args:
        seed: the run's seed.
        key: what the draw is for, e.g. ``(epoch, sample_id, "noise")``. Equal keys give equal draws.

    Returns:
        A numpy generator over Philox 4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
    """
    text = "\x1f".join(str(part) for part in (seed, *key))
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def normal(seed: int, *key: int | str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal float32 noise of ``shape`` for one key, on the CPU."""
    import torch

    return torch.from_numpy(generator(seed, *key).standard_normal(shape, dtype=np.float32))
