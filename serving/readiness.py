"""What ``/readyz`` says: the replica's word on which weights it runs, and for deployments the proof that it does."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Readiness(BaseModel):
    """The body of ``GET /readyz``."""

    model_config = ConfigDict(frozen=True)

    status: Literal["ready", "not ready"]
    """Whether requests are denoised."""
    model: str
    """What is served: ``name/version``, or the name of a bundle's directory."""
    bundle_sha256: str
    """The checksum of the bundle's ``darkroom.json``: equal values mean equal weights."""
    running_images: int
    """Images that are being denoised."""
    waiting_images: int
    """Images that were accepted and are not being denoised yet."""
