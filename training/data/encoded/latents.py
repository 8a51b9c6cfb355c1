"""Latents, kept as the moments of their posterior: what is drawn from them is what encoding online would draw."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from training.autoencoder import Autoencoder, LatentSpace, autoencoder_directory
from training.data.augment import AugmentConfig
from training.data.buckets import Bucket, BucketsConfig, Members, assign, buckets_of
from training.data.dataset import Dataset, Split
from training.data.encoded.cache import Cache
from training.data.encoded.tick import Tick
from training.data.encoded.values import STORED, as_bytes
from training.data.manifest import SplitName
from training.data.pixels import PixelReader
from training.directory_hash import directory_hash
from training.errors import ConfigError, DataError
from training.latents_config import LatentsConfig

PLACES = "places"
"""``[samples, 3]``: a sample's first value, and the height and width of its latent; the first value is -1 where the
picture cannot be read. The moments of the mirrored picture follow those of the picture."""

_FORMAT = 1
"""Another number once the same pictures' latents are kept otherwise."""

_PIXELS, _ROWS = 8 * 512 * 512, 32
"""Of one pass of the autoencoder, at most."""


@dataclass(frozen=True)
class LatentsJob:
    """Encoding the pictures of a data set; it travels to the processes that do it.

    Attributes:
        config: the autoencoder, and how its latents are kept.
        resolution: side of square pictures, in pixels.
        buckets: the shapes of training pictures; held-out ones are square.
        fewest: samples that a shape must hold, the global batch.
        flips: keep the latents of the mirrored pictures too.
        scaled: decode large JPEGs at a fraction of their size.
    """

    config: LatentsConfig
    resolution: int
    buckets: BucketsConfig = field(default_factory=BucketsConfig)
    fewest: int = 1
    flips: bool = False
    scaled: bool = True

    @property
    def kind(self) -> str:
        """Names it among the kinds of encoding."""
        return "latents"

    @property
    def space(self) -> LatentSpace:
        """Where the latents lie.

        Raises:
            ConfigError: the autoencoder is not there.
        """
        return LatentSpace.of(autoencoder_directory(self.config.autoencoder))

    def shapes(self, dataset: Dataset, split: SplitName) -> tuple[Bucket, ...]:
        """The shapes that pictures are cut to.

        Raises:
            ConfigError: the autoencoder does not take one.
            StorageError: the lists of the buckets cannot be written.
        """
        shapes: tuple[Bucket, ...] = (Bucket(self.resolution, self.resolution, self.resolution),)
        if split == "train":
            shapes = Members.open(
                dataset.split(split).records,
                buckets_of(self.resolution, self.buckets),
                fewest=self.fewest,
                data_hash=f"{dataset.hash}/{split}",
            ).buckets
        factor = self.space.factor
        for shape in shapes:
            if shape.width % factor or shape.height % factor:
                raise ConfigError(
                    "The autoencoder does not take pictures of this size.",
                    value=f"{shape.width}x{shape.height}",
                    rule=f"sides that are multiples of {factor} pixels",
                )
        return shapes

    def cache(self, dataset: Dataset, split: SplitName) -> Cache:
        """Where the latents of a split are kept.

        Raises:
            ConfigError: the autoencoder is not there, or does not take pictures of a shape.
            StorageError: the lists of the buckets cannot be written.
        """
        about = {
            "format": _FORMAT,
            "autoencoder": directory_hash(autoencoder_directory(self.config.autoencoder)),
            "dtype": self.config.dtype,
            "shapes": [list(shape) for shape in self.shapes(dataset, split)],
            "flips": self.flips,
            "background": dataset.manifest.config.background,
            "scaled_decoding": self.scaled,
        }
        return Cache.of(dataset, split, self.kind, about)

    def encode(self, cache: Cache, number: int, split: Split, tick: Tick) -> int:
        """Make and keep the latents of one image shard.

        Args:
            cache: keeps them.
            number: the image shard.
            split: its split.
            tick: told of samples that are done.

        Returns:
            How many pictures could not be read.

        Raises:
            ConfigError: the autoencoder cannot be loaded.
            StorageError: storage answers with errors.
        """
        shard, stored = cache.shards[number], STORED[self.config.dtype]
        autoencoder = _autoencoder(Path(self.config.autoencoder))
        places = np.full((shard.count, 3), (-1, 0, 0), dtype=np.int64)
        shapes = tuple(Bucket(*each) for each in cache.about["shapes"])
        with cache.writing(number, tables={PLACES: places}, dtype=stored, row_shape=()) as writer:
            for ids, pictures in _batches(split, shard.samples, shapes, self.scaled, tick):
                for sample_id, moments in zip(ids, self._moments(autoencoder, pictures), strict=False):
                    first = writer.append(as_bytes(moments, stored))
                    places[sample_id - shard.first] = (first, *moments.shape[-2:])
        return int((places[:, 0] < 0).sum())

    def _moments(self, autoencoder: Autoencoder, pictures: np.ndarray) -> torch.Tensor:
        """``[B, 1 or 2, 2 channels, h, w]``: of each picture, and of its mirror image."""
        clean = as_network_sees(torch.from_numpy(pictures))
        each = [clean, clean.flip(-1)] if self.flips else [clean]
        return torch.stack([autoencoder.moments(part) for part in each], dim=1)


def as_network_sees(pictures: torch.Tensor) -> torch.Tensor:
    """``[B,H,W,3]`` uint8 as ``[B,3,H,W]`` in -1..1."""
    return pictures.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def _batches(
    split: Split, samples: range, shapes: tuple[Bucket, ...], scaled: bool, tick: Tick
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Pictures of one shape, and the ids of those that are samples.

    Always as many of a shape: a kernel orders its sums by the batch's shape. The last ones are filled up with black.
    """
    reader = PixelReader(split, AugmentConfig(), seed=0, scaled=scaled)
    records = split.records[samples.start : samples.stop]
    assigned = assign(records["width"], records["height"], shapes)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="decode") as pool:
        for place, shape in enumerate(shapes):
            rows = max(1, min(_ROWS, _PIXELS // (shape.width * shape.height)))
            ids = (np.flatnonzero(assigned == place) + samples.start).tolist()
            for start in range(0, len(ids), rows):
                part = ids[start : start + rows]
                pictures = np.zeros((rows, shape.height, shape.width, 3), dtype=np.uint8)
                found = list(pool.map(_readable, [reader] * len(part), part, pictures))
                good = [row for row, readable in enumerate(found) if readable]
                if good:
                    pictures[: len(good)] = pictures[good]
                    yield [part[row] for row in good], pictures
                tick(len(part))


def _readable(reader: PixelReader, sample_id: int, row: np.ndarray) -> bool:
    try:
        reader.read(sample_id, 0, row)
    except DataError:
        return False
    return True


@lru_cache(maxsize=1)
def _autoencoder(directory: Path) -> Autoencoder:
    return Autoencoder(directory, "cuda" if torch.cuda.is_available() else "cpu")
