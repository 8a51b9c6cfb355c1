"""What a network is told about each picture, and who turns prompts into it."""

from training.conditioning.classes import ClassEncoder
from training.conditioning.encoder import (
    CaptionEncoder,
    Encoder,
    caption_encoder,
    captions_shape,
    encoder_for,
    encoder_key,
    encoder_shape,
)
from training.conditioning.nothing import NoEncoder
from training.conditioning.shape import ConditioningShape
from training.conditioning.text import TextEncoder, encoder_directory
from training.conditioning.told import Conditioning
from training.conditioning_config import (
    PACKAGED_ENCODER,
    ClassConfig,
    ConditioningConfig,
    NothingConfig,
    TextConfig,
)

__all__ = [
    "PACKAGED_ENCODER",
    "CaptionEncoder",
    "ClassConfig",
    "ClassEncoder",
    "Conditioning",
    "ConditioningConfig",
    "ConditioningShape",
    "Encoder",
    "NoEncoder",
    "NothingConfig",
    "TextConfig",
    "TextEncoder",
    "caption_encoder",
    "captions_shape",
    "encoder_directory",
    "encoder_for",
    "encoder_key",
    "encoder_shape",
]
