"""Streams for the loader's tests."""

import itertools
from typing import Any

import torch

from training.data.augment import AugmentConfig
from training.data.batch import Batch
from training.data.buckets import Bucket, Members
from training.data.dataset import Split
from training.data.loader import Loader
from training.data.pixels import PixelReader
from training.data.schedule import Schedule


def loader_of(split: Split, rows: int, seed: int, resolution: int = 8, **options: Any) -> Loader:
    """A loader of squares, as a recipe without a word about buckets has it."""
    cache_mb = options.pop("cache_mb", 0)
    members = Members((Bucket(resolution, resolution, resolution),), (len(split),))
    schedule = Schedule(members, global_batch=rows, seed=seed, block=4, window=3)
    reader = PixelReader(split, options.pop("augment", AugmentConfig()), seed=seed, cache_mb=cache_mb)
    return Loader(schedule, reader, **options)


def take(loader: Loader, count: int, position: int = 0) -> list[Batch]:
    """Its first batches from a position on."""
    with loader:
        return list(itertools.islice(loader.batches(position), count))


def _facts(batch: Batch) -> tuple[Any, ...]:
    return batch.captions, batch.sample_ids, batch.epochs, batch.position, batch.valid, batch.bucket


def same(one: Batch, other: Batch) -> bool:
    """Whether two batches are equal in everything."""
    equal = torch.equal(one.images, other.images) and torch.equal(one.sizes, other.sizes)
    return _facts(one) == _facts(other) and equal
