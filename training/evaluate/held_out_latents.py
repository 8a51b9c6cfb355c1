"""The latents of the held-out pictures that are measured: the same draws of their posterior at every evaluation."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from training.data.augment import AugmentConfig
from training.data.dataset import Dataset
from training.data.encoded.latent_reader import LatentReader
from training.data.encoded.latents import LatentsJob
from training.errors import DataError

_KEY = 0
"""Keys the draws from the posteriors; no recipe changes it."""
_log = logging.getLogger(__name__)


class HeldOutLatents:
    """Reads kept latents of the held-out split.

    Args:
        dataset: of the run; its latents are encoded.
        job: how.

    Raises:
        ConfigError: the autoencoder is not there.
    """

    def __init__(self, dataset: Dataset, job: LatentsJob) -> None:
        self._reader = LatentReader.open(dataset, "held_out", job, AugmentConfig(), seed=_KEY)
        self._shape = self._reader.row_shape(job.resolution, job.resolution)

    def read(self, sample_ids: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """These samples' latents, those of pictures that cannot be read left out with a warning.

        Returns:
            float32 ``[N,C,h,w]``, and the places in ``sample_ids`` that they have.

        Raises:
            StorageError: they were not encoded, or storage answers with errors.
        """
        rows = np.zeros((len(sample_ids), *self._shape), dtype=np.float32)
        places: list[int] = []
        for place, sample_id in enumerate(sample_ids):
            try:
                self._reader.read(sample_id, 0, rows[len(places)])
            except DataError as error:
                _log.warning("Left out held_out[%d], for it cannot be read: %s", sample_id, error.rule)
                continue
            places.append(place)
        return torch.from_numpy(rows[: len(places)]).permute(0, 3, 1, 2).contiguous(), places
