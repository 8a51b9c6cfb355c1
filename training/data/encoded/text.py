"""Text states, kept sample by sample: real tokens only, and those of equal captions of a shard once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from training.conditioning import CaptionEncoder, Conditioning, caption_encoder, captions_shape, encoder_key
from training.conditioning_config import CaptionsConfig
from training.data.dataset import Dataset, Split
from training.data.encoded.cache import Cache
from training.data.encoded.tick import Tick
from training.data.encoded.values import STORED, as_bytes, as_tensor
from training.data.manifest import SplitName
from training.errors import DataError

_FORMAT = 1
"""Another number once the same encoder's states are kept otherwise."""

_ROWS = 64
"""Captions of one pass of the encoder, filled up with empty ones: a kernel orders its sums by the batch's shape, and so
a caption's states are the same bits whoever shares its shard."""

_SPANS = "spans"
"""``[samples, 2]``: the first value row of a sample's tokens, and how many they are. The pooled state follows, in as
many rows as it needs, where the encoder has one."""


@dataclass(frozen=True)
class TextJob:
    """Encoding the captions of a data set; it travels to the processes that do it.

    Attributes:
        config: the encoder, and how its states are kept.
    """

    config: CaptionsConfig

    @property
    def kind(self) -> str:
        """Names it among the kinds of encoding."""
        return "text"

    def about(self) -> dict[str, Any]:
        """What the states depend on apart from the captions.

        Raises:
            ConfigError: the encoder is not there.
        """
        return {
            "format": _FORMAT,
            **encoder_key(self.config),
            "dtype": self.config.dtype,
        }

    def cache(self, dataset: Dataset, split: SplitName) -> Cache:
        """Where the states of a split's captions are kept.

        Raises:
            ConfigError: the encoder is not there.
        """
        return Cache.of(dataset, split, self.kind, self.about())

    def encode(self, cache: Cache, number: int, split: Split, tick: Tick) -> int:
        """Make and keep the states of one image shard's captions.

        Args:
            cache: keeps them.
            number: the image shard.
            split: its split.
            tick: told of samples that are done.

        Returns:
            How many captions could not be read; they count as empty, for the loader passes over such samples.

        Raises:
            ConfigError: the encoder cannot be loaded.
            StorageError: storage answers with errors.
        """
        captions, unreadable = _captions(split, cache.shards[number].samples)
        different = list(dict.fromkeys(captions))
        spans = np.zeros((len(captions), 2), dtype=np.int64)
        places: dict[str, tuple[int, int]] = {}
        encoder, stored = _encoder(self.config), STORED[self.config.dtype]
        width = encoder.shape.width
        with cache.writing(number, tables={_SPANS: spans}, dtype=stored, row_shape=(width,)) as writer:
            for start in range(0, len(different), _ROWS):
                part = different[start : start + _ROWS]
                states = encoder.encode([*part, *[""] * (_ROWS - len(part))], batch=_ROWS)
                for row, caption in enumerate(part):
                    real = states.tokens[row][states.mask[row]]
                    places[caption] = (writer.append(as_bytes(real, stored)), len(real))
                    if states.pooled is not None:
                        writer.append(as_bytes(_in_rows(states.pooled[row], width), stored))
                done = start + len(
                    part
                )  # of the different captions; the samples' share is told, whole numbers that add up
                tick(done * len(captions) // len(different) - start * len(captions) // len(different))
            for row, caption in enumerate(captions):
                spans[row] = places[caption]
        return unreadable


def _captions(split: Split, samples: range) -> tuple[list[str], int]:
    captions, unreadable = [], 0
    for sample_id in samples:
        try:
            captions.append(split.caption(sample_id))
        except DataError:
            captions.append("")
            unreadable += 1
    return captions, unreadable


@lru_cache(maxsize=1)
def _encoder(config: CaptionsConfig) -> CaptionEncoder:
    return caption_encoder(config)


def release_encoder() -> None:
    """Give back the memory of the encoder that stays loaded from shard to shard; a large one takes gigabytes."""
    _encoder.cache_clear()


class TextCache:
    """The text states of a split's captions, read where they are asked for. Threads may share it.

    Args:
        cache: holds them.
        max_tokens: rows are padded to so many tokens.
    """

    def __init__(self, cache: Cache, max_tokens: int) -> None:
        self.cache, self.max_tokens = cache, max_tokens
        self._pooled = int(cache.about.get("pooled", 0))

    @classmethod
    def open(cls, dataset: Dataset, split: SplitName, config: CaptionsConfig) -> TextCache:
        """The states of a split under a recipe's encoder; reads none of them, and does not load the encoder.

        Raises:
            ConfigError: the encoder is not there.
        """
        return cls(TextJob(config).cache(dataset, split), captions_shape(config).tokens)

    def rows(self, sample_ids: Sequence[int]) -> Conditioning:
        """The states of these samples' captions, a row each.

        In fp32 they are those that the encoder gives now, to the bit where it runs on the same kind of machine; fp16
        and bf16 round each number, by a relative 2^-11 and 2^-8 at most.

        Raises:
            StorageError: a shard was not encoded, its file is damaged, or storage answers with errors.
        """
        read = [self._row(sample_id) for sample_id in sample_ids]
        found = [tokens for tokens, _ in read]
        width = found[0].shape[1] if found else 0
        # numpy's zeros cost nothing where nothing is written
        tokens = torch.from_numpy(np.zeros((len(found), self.max_tokens, width), dtype=np.float32))
        mask = torch.zeros(len(found), self.max_tokens, dtype=torch.bool)
        for row, states in enumerate(found):
            tokens[row, : len(states)] = states
            mask[row, : len(states)] = True
        pooled = [state for _, state in read if state is not None]
        return Conditioning(tokens, mask, torch.stack(pooled) if pooled else None)

    def _row(self, sample_id: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        number, row = self.cache.shards.locate(sample_id)
        file = self.cache.file(number)
        first, count = file.tables[_SPANS][row].tolist()
        if not 0 <= count <= self.max_tokens:
            raise self.cache.damaged(number, f"0 to {self.max_tokens} tokens per caption, not {count}")
        (width,) = file.row_shape
        data = self.cache.values(number, first, count + -(-self._pooled // width))
        values = as_tensor(data, file.stored)
        pooled = values[count * width :][: self._pooled] if self._pooled else None
        return values[: count * width].reshape(count, width), pooled


def _in_rows(state: torch.Tensor, width: int) -> torch.Tensor:
    """A vector in whole rows, filled up with zeros."""
    return torch.nn.functional.pad(state, (0, -len(state) % width)).reshape(-1, width)
