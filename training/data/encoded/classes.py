"""The classes of a data set's samples: a number per sample, so that no run reads every caption again to know them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from training.conditioning import ClassEncoder, Conditioning, encoder_key
from training.conditioning_config import ClassConfig
from training.data.dataset import Dataset, Split
from training.data.encoded.cache import Cache
from training.data.encoded.tick import Tick
from training.data.manifest import SplitName
from training.errors import ConfigError, DataError

_FORMAT = 1
"""Another number once classes are kept otherwise."""
_DIGESTS = "digests"
"""``[samples]``: 63 bits of the SHA-256 of a sample's class name; -1 where it has none."""
_NONE = -1
_TOLD = 512
"""Samples between two words of progress."""


@dataclass(frozen=True)
class ClassJob:
    """Looking up the classes of a data set; it travels to the processes that do it.

    Attributes:
        config: which field names the class.
    """

    config: ClassConfig

    @property
    def kind(self) -> str:
        """Names it among the kinds of encoding."""
        return "classes"

    def cache(self, dataset: Dataset, split: SplitName) -> Cache:
        """Where the classes of a split's samples are kept."""
        about: dict[str, Any] = {"format": _FORMAT, **encoder_key(self.config)}
        return Cache.of(dataset, split, self.kind, about)

    def encode(self, cache: Cache, number: int, split: Split, tick: Tick) -> int:
        """Look up and keep the classes of one image shard's samples.

        Args:
            cache: keeps them.
            number: the image shard.
            split: its split.
            tick: told of samples that are done.

        Returns:
            How many samples could not be read; they have no class, for the loader passes over them.

        Raises:
            StorageError: storage answers with errors.
        """
        shard, unreadable = cache.shards[number], 0
        digests = np.full(shard.count, _NONE, dtype=np.int64)
        with cache.writing(number, tables={_DIGESTS: digests}, dtype="F32", row_shape=()):
            for row, sample_id in enumerate(shard.samples):
                try:
                    name = _name(split, sample_id, self.config.field)
                except DataError:
                    name, unreadable = "", unreadable + 1
                digests[row] = _digest(name) if name else _NONE
                if (row + 1) % _TOLD == 0:
                    tick(_TOLD)
            tick(shard.count % _TOLD)
        return unreadable


def _name(split: Split, sample_id: int, field: str) -> str:
    """A sample's class; a number counts as its digits, and nothing else but text as a name."""
    value = split.fields(sample_id).get(field)
    if isinstance(value, int | str) and not isinstance(value, bool):
        return " ".join(str(value).split())
    return ""


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


class ClassCache:
    """The classes of a split's samples as rows of conditioning. Threads may share it.

    Args:
        cache: holds them.
        encoder: the training split's classes.
    """

    def __init__(self, cache: Cache, encoder: ClassEncoder) -> None:
        self.cache, self.encoder = cache, encoder
        self._numbers = {_digest(name): number for number, name in enumerate(encoder.names)}

    @classmethod
    def open(cls, dataset: Dataset, split: SplitName, config: ClassConfig) -> ClassCache:
        """The classes of a split, numbered as the training split has them, by name.

        Raises:
            ConfigError: the training split has no class, or more than the recipe allows.
            StorageError: its classes were not looked up, or storage answers with errors.
        """
        job = ClassJob(config)
        names = _names(dataset.split("train"), job.cache(dataset, "train"), config)
        return cls(job.cache(dataset, split), ClassEncoder(names))

    def rows(self, sample_ids: Sequence[int]) -> Conditioning:
        """A row per sample; the unconditional class where it has none, or one that no training sample has.

        Raises:
            StorageError: a shard's classes were not looked up, or storage answers with errors.
        """
        numbers = torch.tensor([self._number(sample_id) for sample_id in sample_ids], dtype=torch.float32)
        return Conditioning(numbers.reshape(-1, 1, 1), torch.ones(len(sample_ids), 1, dtype=torch.bool))

    def _number(self, sample_id: int) -> int:
        number, row = self.cache.shards.locate(sample_id)
        digest = int(self.cache.file(number).tables[_DIGESTS][row])
        return self._numbers.get(digest, self.encoder.shape.classes)


def _names(split: Split, cache: Cache, config: ClassConfig) -> list[str]:
    """The different classes, in alphabetical order; shard by shard, and a name is read once."""
    firsts: dict[int, int] = {}
    for number in range(len(cache.shards)):
        digests = cache.file(number).tables[_DIGESTS]
        found, places = np.unique(digests, return_index=True)
        for digest, place in zip(found.tolist(), places.tolist(), strict=True):
            if digest != _NONE:
                firsts.setdefault(digest, cache.shards[number].first + place)
        if len(firsts) > config.most:
            raise ConfigError(
                f"The data set has more than {config.most} classes.",
                value=f"conditioning.field={config.field}",
                rule="a field with a class's name",
                mend="conditioning.kind=text for captions, or a larger conditioning.most",
            )
    if not firsts:
        raise ConfigError(
            "The data set has no classes.",
            value=f"conditioning.field={config.field}",
            rule="a field that pictures of the training split have",
            mend="conditioning.kind=none trains without any",
        )
    return sorted(_name(split, sample_id, config.field) for sample_id in firsts.values())
