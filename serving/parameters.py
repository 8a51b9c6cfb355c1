"""What makes a picture again: its request, its model, and how the engine was run."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from serving.execution import Execution
from serving.images import OutputFormat
from serving.model import ModelCard
from serving.schemas import MAX_SEED, GenerationRequest
from training.sampling_config import SamplerName


class Parameters(BaseModel):
    """All that one picture depends on; every picture carries it as JSON."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # a later server's pictures can be read, too

    model: str
    """The model's name and, where a registry knows it, its version: ``name/3``."""
    bundle_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """The checksum of the model's ``darkroom.json``: equal values mean equal weights."""
    run_id: str | None = None
    """The MLflow run that trained the model."""
    data_hash: str | None = None
    """The data set that it learned from."""
    adapter: str | None = None
    """The LoRA on top of the model."""
    prompt: str
    """What the picture shows."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    seed: int = Field(ge=0, le=MAX_SEED)
    """The seed that makes this picture alone."""
    steps: int = Field(ge=1)
    """Denoising steps."""
    guidance_scale: float = Field(ge=1, allow_inf_nan=False)
    """Classifier-free guidance; 1 is unguided."""
    sampler: SamplerName
    """How it was denoised."""
    width: int = Field(ge=1, le=100_000)
    """Pixels."""
    height: int = Field(ge=1, le=100_000)
    """Pixels."""
    start_sha256: str | None = None
    """The picture that it was made from, by its RGB pixels once it was fitted to the size."""
    strength: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    """How much of the way from noise was taken; None where it started from noise."""
    mask_sha256: str | None = None
    """Where it was allowed to change, by the mask's fitted grey pixels of two levels; None is everywhere."""
    execution: Execution
    """How it was computed: elsewhere the last bits may be others."""
    software: str
    """What computed it, with versions."""
    watermark: str | None = Field(default=None, pattern=r"^[0-9a-f]{6}$")
    """What the mark in its pixels says: the first digits of ``bundle_sha256``; None where there is no mark."""
    watermark_strength: float | None = Field(default=None, gt=0, le=32, allow_inf_nan=False)
    """Of the mark, in grey levels."""
    output_format: OutputFormat
    """The file's format."""
    quality: int | None = Field(default=None, ge=0, le=100)
    """Of a lossy file; None where the request named none."""


def parameters_of(
    request: GenerationRequest,
    *,
    seed: int,
    card: ModelCard,
    execution: Execution,
    output_format: OutputFormat,
    quality: int | None = None,
    watermark_strength: float | None = None,
) -> Parameters:
    """What makes this one picture again.

    Args:
        request: what the engine was asked.
        seed: the picture's own.
        card: the model.
        execution: how the engine computes.
        output_format: the file's format.
        quality: of a lossy file.
        watermark_strength: of the mark in the pixels, in grey levels; None where there is none.
    """
    start = request.start
    return Parameters(
        model=card.names[-1],
        bundle_sha256=card.bundle_sha256,
        run_id=card.run_id,
        data_hash=card.data_hash,
        **request.model_dump(include={"adapter", "prompt", "negative_prompt", "steps", "guidance_scale", "sampler"}),
        seed=seed,
        width=request.width,
        height=request.height,
        start_sha256=None if start is None else pixels_sha256(start.image),
        strength=None if start is None else start.strength,
        mask_sha256=None if start is None or start.mask is None else pixels_sha256(start.mask),
        execution=execution,
        software=software(),
        watermark=None if watermark_strength is None else payload_of(card.bundle_sha256),
        watermark_strength=watermark_strength,
        output_format=output_format,
        quality=quality,
    )


def payload_of(bundle_sha256: str) -> str:
    """What the mark in the pixels says of a model."""
    return bundle_sha256[:6]


def pixels_sha256(image: Image.Image) -> str:
    """Names a picture by its pixels, whatever its file."""
    return hashlib.sha256(image.tobytes()).hexdigest()


@cache
def software() -> str:
    """This code and what it computes with."""
    return ", ".join(f"{name} {version(name)}" for name in ("darkroom", "torch"))
