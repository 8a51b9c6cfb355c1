"""The real pictures that an evaluation looks at: a bounded choice of a split, read when they are needed."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from training import noise
from training.data.dataset import Split
from training.data.decode import square
from training.errors import DataError

_KEY = 0
"""Keys the choice; no recipe changes it, so that all runs of a data set are measured on the same pictures."""
_log = logging.getLogger(__name__)


def spread(count: int, most: int) -> list[int]:
    """Sample ids that stand for a split: one from each of ``most`` equal stretches; all ids where there are fewer.

    Drawn within its stretch and not at a fixed stride, which would see one kind only where kinds take turns.

    Args:
        count: samples in the split.
        most: how many to choose at most.
    """
    if count <= most:
        return list(range(count))
    places = noise.generator(_KEY, "spread", count, most).random(most)
    chosen = []
    for number, place in enumerate(places.tolist()):
        low, high = number * count // most, (number + 1) * count // most  # at least one sample apart
        chosen.append(low + int(place * (high - low)))
    return chosen


def read_pictures(split: Split, sample_ids: Sequence[int], resolution: int) -> tuple[torch.Tensor, list[int]]:
    """These pictures of a split, those that cannot be read left out with a warning.

    Returns:
        uint8 ``[N,3,R,R]``, and the places in ``sample_ids`` that they have.
    """
    pictures, places = [torch.empty(0, 3, resolution, resolution, dtype=torch.uint8)], []
    for place, sample_id in enumerate(sample_ids):
        try:
            pixels = square(split.picture(sample_id)[0], resolution)
        except DataError as error:
            _log.warning("Left out %s[%d], for it cannot be read: %s", split.name, sample_id, error.rule)
            continue
        pictures.append(torch.from_numpy(pixels).permute(2, 0, 1)[None])
        places.append(place)
    return torch.cat(pictures), places


def read_caption(split: Split, sample_id: int) -> str:
    """A sample's caption; none where it is damaged, for such a sample is left out and ends nothing."""
    try:
        return split.caption(sample_id)
    except DataError:
        return ""
