"""From kept moments to the rows of a batch, as the loader wants them."""

from __future__ import annotations

import numpy as np

from training import noise
from training.autoencoder import LatentSpace
from training.data.augment import AugmentConfig, conditioning, cut, draw
from training.data.dataset import Dataset, Split
from training.data.encoded.cache import Cache
from training.data.encoded.latents import PLACES, LatentsJob
from training.data.encoded.values import as_tensor
from training.data.manifest import SplitName
from training.data.pixels import Row
from training.errors import ConfigError, DataError


class LatentReader:
    """Writes latents into rows ``[height, width, channels]`` of float32. Threads may share it.

    A row is what encoding the picture online gives, drawn from its posterior with the noise of the key ``(seed, epoch,
    sample id, "posterior")`` and scaled as the network sees it. Kept in fp32 it differs by the sums' order alone, some
    1e-5; fp16 and bf16 round mean and log-variance by a relative 2^-11 and 2^-8.

    Args:
        split: whose samples.
        cache: of their moments.
        space: where they lie.
        augment: how samples are varied; mirroring is all that kept latents allow.
        seed: keys the draws.
        flips: mirrored pictures were kept.

    Attributes:
        dtype: of the rows.
        cache_bytes: 0, for rows are not kept.

    Raises:
        ConfigError: the pictures are to be varied otherwise.
    """

    dtype = np.dtype(np.float32)
    cache_bytes = 0

    def __init__(
        self, split: Split, cache: Cache, space: LatentSpace, augment: AugmentConfig, *, seed: int, flips: bool
    ) -> None:
        require_cacheable(augment)
        if augment.flip and not flips:
            raise ConfigError(
                "The latents of mirrored pictures were not kept.",
                value=f"augment.flip={augment.flip}",
                rule="a cache that was made with both",
                mend="darkroom data encode --flip",
            )
        self._split, self._cache, self._space = split, cache, space
        self._augment, self._seed, self._flips = augment, seed, flips
        records = np.asarray(split.records)
        self._widths, self._heights = records["width"], records["height"]

    @classmethod
    def open(
        cls, dataset: Dataset, split: SplitName, job: LatentsJob, augment: AugmentConfig, *, seed: int
    ) -> LatentReader:
        """The reader of a split's kept latents; reads none, and does not load the autoencoder.

        Raises:
            ConfigError: the autoencoder is not there, or the pictures are to be varied in ways that cannot be kept.
        """
        return cls(dataset.split(split), job.cache(dataset, split), job.space, augment, seed=seed, flips=job.flips)

    def row_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Of a row for pictures of this size, channels last."""
        return height // self._space.factor, width // self._space.factor, self._space.channels

    def read(self, sample_id: int, epoch: int, row: np.ndarray) -> Row:
        """Fill a row with a sample.

        Raises:
            DataError: its picture could not be read when it was encoded.
            StorageError: its shard was not encoded, the file is damaged, or storage answers with errors.
        """
        number, place = self._cache.shards.locate(sample_id)
        file = self._cache.file(number)
        first, height, width = file.tables[PLACES][place].tolist()
        if first < 0:
            name = f"{self._split.name}[{sample_id}]"
            raise DataError("A sample cannot be read.", value=name, rule="its picture could not be encoded")
        channels = self._space.channels
        if (height, width, channels) != row.shape:
            raise self._cache.damaged(number, f"a latent of {height}x{width} where {row.shape[:2]} is due")
        drawn = draw(self._augment, self._seed, epoch, sample_id)
        size = 2 * channels * height * width
        data = self._cache.values(number, first + size * drawn.flip, size)
        moments = as_tensor(data, file.stored).reshape(2 * channels, height, width)
        posterior = noise.normal(self._seed, epoch, sample_id, "posterior", shape=(channels, height, width))
        row[:] = self._space.draw(moments, posterior).permute(1, 2, 0).numpy()
        target = (width * self._space.factor, height * self._space.factor)
        size_px = (int(self._widths[sample_id]), int(self._heights[sample_id]))
        return Row(self._split.caption(sample_id), conditioning(cut(size_px, target, drawn), target, drawn))


def require_cacheable(augment: AugmentConfig) -> None:
    """Refuse what gives a picture other latents in each epoch.

    Raises:
        ConfigError: pictures are cut, turned or coloured at random.
    """
    if augment.moves or augment.colours:
        told = augment.model_dump(exclude_defaults=True, exclude={"flip"})
        raise ConfigError(
            "Latents of pictures that are cut, turned or coloured at random cannot be kept.",
            value=", ".join(f"data.augment.{name}={value}" for name, value in told.items()),
            rule="the same picture in every epoch, mirrored or not",
            options=["data.augment.flip", "pixels (no latents section)"],
        )
