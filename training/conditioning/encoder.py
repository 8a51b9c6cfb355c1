"""The encoder that a recipe's conditioning names; what is known of it before it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from training.conditioning.nothing import NoEncoder
from training.conditioning.shape import ConditioningShape
from training.conditioning.text import TextEncoder, encoder_directory, text_shape
from training.conditioning_config import (
    CaptionsConfig,
    ClassConfig,
    ConditioningConfig,
    NothingConfig,
    PipelineTextConfig,
)
from training.directory_hash import directory_hash
from training.finetune.layout import Pipeline

if TYPE_CHECKING:
    from training.conditioning.told import Conditioning
    from training.data.dataset import Dataset


class Encoder(Protocol):
    """Captions or prompts to conditioning."""

    @property
    def shape(self) -> ConditioningShape:
        """Of its rows."""
        ...

    @property
    def hash(self) -> str:
        """Equal hashes give equal rows."""
        ...

    def check(self, prompt: str) -> None:
        """Refuse, with a ``UsageError``, what it cannot tell the network whole."""
        ...

    def encode(self, captions: Sequence[str]) -> Conditioning:
        """A row per caption; ``""`` is the unconditional one."""
        ...


class CaptionEncoder(Encoder, Protocol):
    """One that reads words, and whose rows are worth keeping."""

    def encode(self, captions: Sequence[str], batch: int = 64) -> Conditioning:
        """A row per caption, in passes of ``batch``."""
        ...


def caption_encoder(config: CaptionsConfig) -> CaptionEncoder:
    """The encoder of captions that a recipe names, loaded.

    Raises:
        ConfigError: it is not there.
    """
    if isinstance(config, PipelineTextConfig):
        from training.finetune.encoder import PipelineEncoder
        from training.finetune.inversion_tokens import TokenEncoder

        if config.inverted is not None:
            return TokenEncoder(Path(config.pipeline), config.inverted)
        return PipelineEncoder(Path(config.pipeline), config.max_tokens)
    return TextEncoder.from_config(config)


def encoder_for(config: ConditioningConfig, dataset: Dataset) -> Encoder:
    """The encoder of a recipe, loaded.

    Args:
        config: the recipe's section.
        dataset: what is trained on; its classes, where the network is told classes, must have been looked up.

    Raises:
        ConfigError: the encoder is not there, or the data set has no or too many classes.
        StorageError: the data set's classes were not looked up, or storage answers with errors.
    """
    if isinstance(config, NothingConfig):
        return NoEncoder()
    if isinstance(config, ClassConfig):
        from training.data.encoded.classes import ClassCache

        return ClassCache.open(dataset, "train", config).encoder
    return caption_encoder(config)


def encoder_shape(config: ConditioningConfig, dataset: Dataset) -> ConditioningShape:
    """Of the encoder's rows; a text encoder is not loaded for it.

    Raises:
        ConfigError: as ``encoder_for``.
        StorageError: as ``encoder_for``.
    """
    if isinstance(config, ClassConfig | NothingConfig):
        return encoder_for(config, dataset).shape
    return captions_shape(config)


def captions_shape(config: CaptionsConfig) -> ConditioningShape:
    """Of the rows of captions; the encoder is not loaded for it.

    Raises:
        ConfigError: the encoder is not there.
    """
    if isinstance(config, PipelineTextConfig):
        from training.finetune.inversion_tokens import ids_shape  # late: they tell shapes in this package's words
        from training.finetune.tokens import shape_of

        pipeline = Pipeline.read(Path(config.pipeline))
        return shape_of(pipeline, config.max_tokens) if config.inverted is None else ids_shape(pipeline)
    return text_shape(config)


def encoder_key(config: ConditioningConfig) -> dict[str, Any]:
    """What the states of a caption depend on apart from the caption; a text encoder is not loaded for it.

    Raises:
        ConfigError: the encoder is not there.
    """
    if isinstance(config, ClassConfig):
        return {"field": config.field}
    if isinstance(config, NothingConfig):
        return {}
    key: dict[str, Any] = {"encoder": _captions_hash(config), "max_tokens": config.max_tokens}
    pooled = captions_shape(config).pooled
    return {**key, "pooled": pooled} if pooled else key


def _captions_hash(config: CaptionsConfig) -> str:
    if isinstance(config, PipelineTextConfig):
        from training.finetune.inversion_tokens import ids_hash
        from training.finetune.tokens import encoders_hash

        pipeline = Pipeline.read(Path(config.pipeline))
        return encoders_hash(pipeline) if config.inverted is None else ids_hash(pipeline, config.inverted)
    return directory_hash(encoder_directory(config.encoder))
