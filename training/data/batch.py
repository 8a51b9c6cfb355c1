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
        images: ``[rows, 3, height, width]`` uint8, in channels-last memory as decoders write it; the step converts it
            on the device. Another reader than that of pixels brings its own channels and type.
        captions: one per row.
        sample_ids: one per row.
        epochs: one per row, how often its sample was read before; a batch may cross the border between two.
        position: place in the endless stream of the first sample of the *global* batch.
        valid: one per row; False where the sample cannot be read. Such a row is zeros, and no other sample takes its
            place.
        bucket: number of the shape among those of the schedule.
        sizes: ``[rows, 6]`` int32, what SDXL conditions on: height and width of the picture, top and left of the cut,
            height and width of the target, pixels (see ``augment.conditioning``); zeros where a row is not valid.
    """

    images: torch.Tensor
    captions: tuple[str, ...]
    sample_ids: tuple[int, ...]
    epochs: tuple[int, ...]
    position: int
    valid: tuple[bool, ...]
    bucket: int
    sizes: torch.Tensor

    def __len__(self) -> int:
        return len(self.sample_ids)
