"""What the jobs API is asked and what it answers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serving.config import AdapterName
from serving.envelope import ErrorBody
from serving.images import OutputFormat
from serving.openai_schemas import Text, null_is_default
from serving.schemas import MAX_SEED
from training.sampling_config import SamplerName

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
"""Where a job is; the last three are ends."""
ENDS = ("succeeded", "failed", "cancelled")
WebhookStatus = Literal["pending", "delivered", "failed"]
"""Whether the job's end was told; ``failed`` after the last try."""


class JobRequest(BaseModel):
    """The body of ``POST /v1/jobs``; null means the default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Text
    """What the images show."""
    negative_prompt: Text = ""
    """What the images should not show."""
    model: Text | None = None
    """A model of ``GET /v1/models``; this server's own by default."""
    adapter: AdapterName | None = None
    """A LoRA by the name that the server gives it."""
    n: int = Field(default=1, ge=1)
    """How many images."""
    size: Text = "auto"
    """``WIDTHxHEIGHT`` in pixels, or ``auto``: what the model was trained at."""
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    """Image i has seed + i; drawn at random where missing, and told in the response."""
    num_inference_steps: int | None = Field(default=None, ge=1)
    """Denoising steps."""
    guidance_scale: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    """How strongly the images follow the prompt; 1 is unguided."""
    sampler: SamplerName = "euler"
    """How an image is denoised."""
    image: Text | None = None
    """A picture to start from, in base64, with or without ``data:...;base64,`` before it."""
    mask: Text | None = None
    """A picture in base64, white where ``image`` may change and black where it is kept."""
    strength: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    """How far ``image`` may change: 0.75 for a whole picture, 1 where a mask says what may change."""
    output_format: OutputFormat = "png"
    """The images' file format."""
    output_compression: int | None = Field(default=None, ge=0, le=100)
    """Quality of a lossy file."""
    webhook_url: Text | None = Field(default=None, max_length=2000)
    """Told of the job's end, by a signed POST."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, body: Any) -> Any:
        return null_is_default(body)


class JobImage(BaseModel):
    """One finished image."""

    index: int
    """Which image of the job, from 0."""
    seed: int
    """The seed that makes this image alone."""
    url: str
    """Where its file is, on this server."""
    bytes: int
    """Of the file."""
    sha256: str
    """Of the file."""


class JobStatus(BaseModel):
    """The answer to ``GET /v1/jobs/{id}``."""

    id: str
    """The job's name."""
    object: Literal["job"] = "job"
    """Always ``job``."""
    status: Status
    """Where it is."""
    cancelling: bool
    """Whether somebody asked to end it and it has not ended yet."""
    progress: float
    """0..1, how much of its denoising is done."""
    created_at: int
    """When it was accepted, seconds since 1970."""
    ended_at: int | None
    """When it ended, seconds since 1970."""
    expires_at: int | None
    """When it will be forgotten, seconds since 1970; None until it has ended."""
    model: str
    """The model that it was accepted by, ``name/version``."""
    seed: int
    """Of its first image."""
    size: str
    """``WIDTHxHEIGHT`` in pixels."""
    n: int
    """How many images it makes."""
    images: list[JobImage]
    """Those that are finished."""
    error: ErrorBody | None
    """Why it failed."""
    webhook: WebhookStatus | None
    """Whether its end was told; None where nobody is."""


class WebhookSecret(BaseModel):
    """The answer to ``GET /v1/webhook-secret``."""

    secret: str
    """``whsec_`` and base64, as the libraries of Standard Webhooks take it."""


class WebhookEvent(BaseModel):
    """What a webhook is told."""

    type: Literal["job.succeeded", "job.failed", "job.cancelled"]
    """What happened."""
    timestamp: str
    """When, ISO 8601."""
    data: JobStatus
    """The job."""
