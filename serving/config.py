"""The settings of the image server."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serving.admission_config import AdmissionConfig
from serving.audit_config import AuditConfig
from serving.jobs_config import JobsConfig
from serving.provenance_config import ProvenanceConfig
from serving.safety_config import SafetyConfig
from serving.scheduling import SchedulingConfig
from serving.speed import SpeedConfig
from serving.telemetry_config import TelemetryConfig

AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
"""What requests call an adapter."""


class BatchConfig(BaseModel):
    """How the engine fills the network."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    padded_rows: int | None = Field(default=None, ge=1, le=1024)
    """Rows of one call of the network, which a step makes; always full, with padding, so that no picture depends on its
    neighbours. An unguided image takes one, a guided image two. None measures the best width of each size, once."""
    max_batch_rows: int = Field(default=8, ge=1, le=1024)
    """The widest call that is tried where the width is measured."""
    width_tolerance: float = Field(default=0.1, ge=0, le=1)
    """Of the widths that were measured, the narrowest is taken whose rows cost at most this share more than the best's:
    a narrow call ends sooner and wastes less where few images are here."""
    max_waiting_images: int = Field(default=64, ge=1)
    """Images accepted and not in the call that is being made; beyond that a request is refused."""
    scheduling: SchedulingConfig = SchedulingConfig()
    """Whose turn it is."""

    @model_validator(mode="after")
    def _narrow_enough(self) -> BatchConfig:
        if self.padded_rows is not None and self.padded_rows > self.max_batch_rows:
            raise ValueError(f"padded_rows {self.padded_rows} must be at most max_batch_rows {self.max_batch_rows}")
        return self


class LimitConfig(BaseModel):
    """What one request may ask for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_steps: int = Field(default=100, ge=1)
    """Denoising steps of one image."""
    default_steps: int = Field(default=20, ge=1)
    """Denoising steps where the request names none."""
    max_guidance_scale: float = Field(default=20.0, gt=1)
    """Largest classifier-free guidance scale; 1 is unguided."""
    default_guidance_scale: float = Field(default=3.0, ge=1)
    """Guidance scale where the request names none."""
    max_images_per_request: int = Field(default=8, ge=1)
    """The largest ``n``."""
    max_pixels: int | None = Field(default=None, ge=1)
    """Pixels of the largest picture of a size that the model was not trained at; None makes no such pictures."""
    max_prompt_characters: int = Field(default=4000, ge=1)
    """A longer prompt is refused before it is tokenised."""

    @model_validator(mode="after")
    def _defaults_allowed(self) -> LimitConfig:
        if self.default_steps > self.max_steps:
            raise ValueError(f"default_steps {self.default_steps} must be at most max_steps {self.max_steps}")
        if self.default_guidance_scale > self.max_guidance_scale:
            raise ValueError(
                f"default_guidance_scale {self.default_guidance_scale} must be at most "
                f"max_guidance_scale {self.max_guidance_scale}"
            )
        return self


class PinnedModel(BaseModel):
    """Exactly which weights a deployment runs, whatever happens to an alias or a directory afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """The registered model, or the name of a bundle's directory."""
    version: int | None
    """The registry's version; None for a directory."""
    sha256: str
    """The checksum of the bundle's ``darkroom.json``, which holds those of all its files."""
    adapters: dict[str, str] = Field(default_factory=dict)
    """The checksums of the adapters' files, by name."""

    @property
    def label(self) -> str:
        """``name/version``, or the directory's name."""
        return self.name if self.version is None else f"{self.name}/{self.version}"


class ServeConfig(BaseModel):
    """One deployment: which model, where it listens, how far it scales."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1)
    """A registered model (``name@champion``, ``name/3``, ``name``) or a bundle's directory."""
    pinned: PinnedModel | None = None
    """What ``model`` meant when it was deployed; filled in by ``serving.model.pinned``."""
    tracking_uri: str | None = None
    """The MLflow server that holds the registry; not needed for a directory. Defaults to ``MLFLOW_TRACKING_URI``."""
    cache: str = "~/.cache/darkroom/bundles"
    """Where a replica keeps the bundles that it fetched from the registry."""
    host: str = "127.0.0.1"
    """Address that the HTTP proxy listens on."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port that the HTTP proxy listens on."""
    min_replicas: int = Field(default=1, ge=0)
    """Replicas kept when nothing is asked; 0 scales to zero."""
    max_replicas: int = Field(default=2, ge=1)
    """Replicas under load."""
    idle_s: float = Field(default=300.0, ge=0)
    """With ``min_replicas`` 0, seconds without a request after which the last replica leaves; the next one waits."""
    target_ongoing_requests: float = Field(default=4.0, gt=0)
    """Requests in flight per replica that the autoscaler aims at."""
    target_work_s: float = Field(default=30.0, gt=0)
    """Seconds of work per replica, as its engine predicts them, that the autoscaler aims at."""
    replica_cpus: float = Field(default=0.1, ge=0)
    """CPUs that Ray reserves for one replica."""
    replica_gpus: float = Field(default=0.0, ge=0)
    """GPUs that Ray reserves for one replica; 0 denoises on the CPU."""
    replica_threads: int = Field(default=1, ge=1)
    """Threads of one replica's tensor operations."""
    batch: BatchConfig = BatchConfig()
    """How the engine fills the network."""
    speed: SpeedConfig = SpeedConfig()
    """What makes pictures faster."""
    adapters: dict[AdapterName, str] = Field(default_factory=dict)
    """LoRAs that requests may name: a file, a directory with one, or a bundle of a run that trained one, by name."""
    limits: LimitConfig = LimitConfig()
    """What one request may ask for."""
    admission: AdmissionConfig = AdmissionConfig()
    """Who may ask, and how much work may wait."""
    jobs: JobsConfig = JobsConfig()
    """Where jobs are kept."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """What it tells about itself: logs and traces; metrics are always there."""
    provenance: ProvenanceConfig = ProvenanceConfig()
    """What pictures tell of where they come from."""
    safety: SafetyConfig = SafetyConfig()
    """Which prompts and pictures are refused."""
    audit: AuditConfig = AuditConfig()
    """Who asked for what, on disk."""
    health_check_period_s: float = Field(default=5.0, gt=0)
    """Seconds between two health checks of a replica."""
    graceful_shutdown_timeout_s: float = Field(default=120.0, ge=0)
    """Seconds that a stopping replica has to finish its requests; as long as a client is ever asked to wait."""
    deploy_timeout_s: float = Field(default=180.0, gt=0)
    """Seconds until a deployment that is not up counts as failed."""

    @model_validator(mode="after")
    def _ranges(self) -> ServeConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} must be at most max_replicas {self.max_replicas}")
        if self.limits.max_images_per_request > self.batch.max_waiting_images:
            raise ValueError(
                f"limits.max_images_per_request {self.limits.max_images_per_request} must be at most "
                f"batch.max_waiting_images {self.batch.max_waiting_images}: such a request could never wait"
            )
        return self
