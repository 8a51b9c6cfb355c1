"""What a recipe says of words that are learnt; read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from training.finetune.start_config import AdapterConfig


class InvertedToken(BaseModel):
    """A word that a pipeline's tokenizers do not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token: str = Field(pattern=r"^[^\s{}]{1,60}$")
    """The word, such as ``<cat-toy>``: whoever says it in a prompt gets what was learnt."""
    vectors: int = Field(default=1, ge=1, le=75)
    """How many embeddings it stands for."""
    template: str = "{caption}, {token}"
    """What a caption without the word becomes, the empty one aside."""

    @field_validator("template")
    @classmethod
    def _has_the_word(cls, template: str) -> str:
        if "{token}" not in template:
            raise ValueError("a template has {token} in it, and {caption} where the caption goes")
        return template

    @property
    def words(self) -> tuple[str, ...]:
        """One for each embedding, as diffusers names them."""
        return (self.token, *(f"{self.token}_{number}" for number in range(1, self.vectors)))

    def in_caption(self, caption: str) -> str:
        """A caption with all of its words."""
        if caption and self.token not in caption:
            caption = self.template.replace("{caption}", caption).replace("{token}", self.token)
        return caption.replace(self.token, " ".join(self.words))


class InversionConfig(InvertedToken):
    """Textual inversion: embeddings of a new word are learnt, and nothing else (Gal et al. 2022, eq. 2)."""

    kind: Literal["textual_inversion"] = "textual_inversion"
    """Chooses it."""
    initial_token: str = Field(min_length=1)
    """A word that says roughly what is meant; the embeddings begin as its own."""


def _with_kind(value: Any) -> Any:
    """LoRA where a recipe names no kind."""
    return {"kind": "lora", **value} if isinstance(value, Mapping) else value


TrainedAdapter = Annotated[AdapterConfig | InversionConfig, Field(discriminator="kind"), BeforeValidator(_with_kind)]
"""What can be trained beside a pipeline's weights."""
