"""Which requests and pictures are refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class NoCheck(BaseModel):
    """Nothing is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["none"] = "none"
    """Nothing is refused."""


class WordCheck(BaseModel):
    """A prompt with one of these words, in any case and between any signs, is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["words"] = "words"
    """A list of words."""
    words: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = Field(min_length=1)
    """Words, or several with spaces between them."""


class TextModelCheck(BaseModel):
    """A prompt that a classifier of texts finds unsafe is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["directory"] = "directory"
    """A model in a directory of transformers: sequence classification, weights as safetensors, with its tokenizer."""
    directory: str = Field(min_length=1)
    """Where it is."""
    labels: tuple[str, ...] = Field(min_length=1)
    """Its labels that are refused."""
    threshold: float = Field(default=0.5, gt=0, le=1)
    """The probability of one of them, from 0 to 1, from which a prompt is refused."""


class OpenNsfwCheck(BaseModel):
    """Yahoo's Open-NSFW, packaged: it knows pornography only, neither violence nor hate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["open_nsfw"] = "open_nsfw"
    """The packaged classifier."""
    threshold: float = Field(default=0.8, gt=0, le=1)
    """The score in 0..1 from which a picture is refused; its makers call 0.8 unsafe and under 0.2 safe."""


class ImageModelCheck(BaseModel):
    """A picture that a model finds unsafe is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["directory"] = "directory"
    """A model in a directory: diffusers' safety checker, or transformers' image classification; safetensors only."""
    directory: str = Field(min_length=1)
    """Where it is."""
    labels: tuple[str, ...] = ()
    """Labels of a classifier that are refused; diffusers' checker has none."""
    threshold: float = Field(default=0.5, gt=0, le=1)
    """The probability of one of them from which a picture is refused; diffusers' checker has its own."""


PromptCheckConfig = Annotated[NoCheck | WordCheck | TextModelCheck, Field(discriminator="kind")]
"""What looks at prompts."""
ImageCheckConfig = Annotated[NoCheck | OpenNsfwCheck | ImageModelCheck, Field(discriminator="kind")]
"""What looks at pictures."""


class SafetyConfig(BaseModel):
    """The checks of what goes in and what comes out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: PromptCheckConfig = NoCheck()
    """Of prompts, before anything is made of them; negative prompts are not looked at."""
    images: ImageCheckConfig = OpenNsfwCheck()
    """Of finished pictures and previews, before anybody sees them."""
