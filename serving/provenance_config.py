"""How pictures are marked."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class WatermarkConfig(BaseModel):
    """The invisible mark in the pixels. Pictures under 256 pixels on a side are too small for it and get none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = True
    """Mark the pictures that are large enough."""
    strength: float = Field(default=2.0, ge=0.5, le=8, allow_inf_nan=False)
    """Root mean square of the mark, in grey levels, where a picture is neither flat nor busy."""


class CredentialsConfig(BaseModel):
    """The C2PA manifest: who made the picture, signed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    certificate: str = Field(min_length=1)
    """A PEM file: the signing certificate, then its issuers."""
    key: str = Field(min_length=1)
    """A PEM file with its private key, not encrypted; it is read once and appears nowhere."""
    algorithm: Literal["es256", "es384", "ps256", "ed25519"] = "es256"
    """How the key signs."""
    timestamp_url: str | None = None
    """A time-stamping authority (RFC 3161) that countersigns every picture; None asks nobody."""


class ProvenanceConfig(BaseModel):
    """What pictures tell of where they come from. Their parameters are always inside."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    watermark: WatermarkConfig = WatermarkConfig()
    """The mark in the pixels."""
    credentials: CredentialsConfig | None = None
    """The signed manifest; None signs nothing."""
    trust_anchors: str | None = None
    """A PEM file of certificates; manifests whose signer leads to one of them count as trusted when verified."""
