"""What a bundle's network is told, as its manifest says it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from training.errors import CheckpointError

if TYPE_CHECKING:
    from training.conditioning import Encoder


class ToldCaptions(BaseModel):
    """Captions, by the encoder in the bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["text"] = "text"
    """Captions."""
    max_tokens: int = Field(ge=1)
    """Longest prompt, in tokens."""
    encoder_hash: str
    """``TextEncoder.hash`` of the encoder that training used."""

    def encoder(self, bundle: Path) -> Encoder:
        """The encoder, loaded."""
        from training.conditioning import TextEncoder

        return TextEncoder(bundle / "text_encoder", self.max_tokens)


class ToldByPipeline(BaseModel):
    """Captions, by the encoders of the pipeline that the bundle is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["pipeline"] = "pipeline"
    """Captions, by several encoders."""
    max_tokens: int = Field(ge=1)
    """Longest prompt, in tokens, where the encoder does not say it itself."""
    encoder_hash: str
    """``PipelineEncoder.hash`` of the encoders that training used."""

    def encoder(self, bundle: Path) -> Encoder:
        """The encoders, loaded."""
        from training.finetune.encoder import PipelineEncoder

        return PipelineEncoder(bundle, self.max_tokens)


class ToldClasses(BaseModel):
    """Classes, by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["class"] = "class"
    """Classes."""
    names: tuple[str, ...]
    """Of the classes, by number."""

    def encoder(self, bundle: Path) -> Encoder:  # noqa: ARG002 - the names are here
        """The encoder."""
        from training.conditioning import ClassEncoder

        return ClassEncoder(self.names)


class ToldNothing(BaseModel):
    """Nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["none"] = "none"
    """Nothing."""

    def encoder(self, bundle: Path) -> Encoder:  # noqa: ARG002 - there is nothing to read
        """The encoder."""
        from training.conditioning import NoEncoder

        return NoEncoder()


Told = Annotated[ToldCaptions | ToldByPipeline | ToldClasses | ToldNothing, Field(discriminator="kind")]
"""Every kind."""


def told_by(encoder: Encoder) -> ToldCaptions | ToldByPipeline | ToldClasses | ToldNothing:
    """What a bundle's manifest says of an encoder.

    Raises:
        CheckpointError: no bundle can hold it.
    """
    from training.conditioning import ClassEncoder, NoEncoder, TextEncoder
    from training.finetune.encoder import PipelineEncoder

    if isinstance(encoder, PipelineEncoder):
        return ToldByPipeline(max_tokens=encoder.max_tokens, encoder_hash=encoder.hash)
    if isinstance(encoder, TextEncoder):
        return ToldCaptions(max_tokens=encoder.max_tokens, encoder_hash=encoder.hash)
    if isinstance(encoder, ClassEncoder):
        return ToldClasses(names=encoder.names)
    if isinstance(encoder, NoEncoder):
        return ToldNothing()
    raise CheckpointError(
        "A bundle cannot hold this encoder.",
        value=type(encoder).__name__,
        rule="one of",
        options=[kind.__name__ for kind in (TextEncoder, PipelineEncoder, ClassEncoder, NoEncoder)],
    )
