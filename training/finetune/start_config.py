"""What a recipe says of the pipeline that it starts from, and of the adapter that it trains; read without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class MergedAdapter(BaseModel):
    """An adapter whose weights are added to the network's before training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(min_length=1)
    """A ``.safetensors`` file in diffusers' format, or a directory with ``pytorch_lora_weights.safetensors``."""
    weight: float = 1.0
    """How much of it is added."""


class StartConfig(BaseModel):
    """The pipeline that a run starts from, in place of fresh weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pipeline: str = Field(min_length=1)
    """A diffusers pipeline's directory, or its id on the Hugging Face hub: ``org/name`` or ``org/name@revision``."""
    adapters: tuple[MergedAdapter, ...] = ()
    """Adapters that are merged into the network first, in this order."""


class AdapterConfig(BaseModel):
    """The adapter that is trained; the network itself stays as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["lora", "dora"] = "lora"
    """``lora``: Hu et al. 2021, "LoRA", eq. 3; ``dora``: Liu et al. 2024, "DoRA", eq. 5."""
    name: str = Field(default="default", pattern=r"^[A-Za-z0-9_]{1,40}$")
    """Names it, beside others of the same network."""
    rank: int = Field(default=16, ge=1, le=1024)
    """Width of the two matrices whose product is learnt."""
    alpha: float | None = Field(default=None, gt=0)
    """The product is multiplied by alpha / rank; None is the rank."""
    targets: tuple[str, ...] = ()
    """Layers that get it, by the ends of their names; empty: the attentions' projections of the family."""
    resume: str | None = None
    """An adapter in diffusers' format to go on from, of the same kind, rank and targets."""

    @property
    def scale(self) -> float:
        """The alpha that is meant."""
        return float(self.rank if self.alpha is None else self.alpha)
