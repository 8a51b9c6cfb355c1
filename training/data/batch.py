"""What flows from the shards to the training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # looking at a data set must not wait for torch
    import torch


@dataclass(frozen=True)
class Sample:
    """One picture as it is in the shards.

    Attributes:
        index: its place in the split's index, which is its sample id.
        key: its WebDataset key.
        image: ``[height, width, 3]`` uint8 RGB, transparency composited over the data set's background.
        caption: one line of text, ``""`` where there is none.
        metadata: all fields stored beside it, the caption included.
    """

    index: int
    key: str
    image: np.ndarray
    caption: str
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch.

    Attributes:
        images: ``[rows, 3, resolution, resolution]`` float32 in -1..1.
        captions: one per row.
        sample_ids: one per row, the index of the sample that was read.
        epochs: one per row; a batch may cross the border between two.
        position: place in the endless stream of the first sample of the *global* batch.
    """

    images: torch.Tensor
    captions: tuple[str, ...]
    sample_ids: tuple[int, ...]
    epochs: tuple[int, ...]
    position: int

    def __len__(self) -> int:
        return len(self.sample_ids)
