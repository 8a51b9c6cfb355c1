"""The settings of the image server."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class BatchConfig(BaseModel):
    """How the engine fills the network."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    padded_rows: int = Field(default=2, ge=1, le=1024)
    """Rows of one call of the network; always full, with padding, so that no picture depends on its neighbours."""
    max_batch_rows: int = Field(default=8, ge=2, le=4096)
    """Rows denoised in one step: an unguided image takes one, a guided image two."""
    max_waiting_images: int = Field(default=64, ge=1)
    """Images accepted and not yet being denoised; beyond that a request is refused."""

    @model_validator(mode="after")
    def _whole_calls(self) -> BatchConfig:
        if self.max_batch_rows % self.padded_rows:
            raise ValueError(
                f"max_batch_rows {self.max_batch_rows} must be a multiple of padded_rows {self.padded_rows}"
            )
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
    target_ongoing_requests: float = Field(default=4.0, gt=0)
    """Requests in flight per replica that the autoscaler aims at."""
    replica_cpus: float = Field(default=0.1, ge=0)
    """CPUs that Ray reserves for one replica."""
    replica_gpus: float = Field(default=0.0, ge=0)
    """GPUs that Ray reserves for one replica; 0 denoises on the CPU."""
    replica_threads: int = Field(default=1, ge=1)
    """Threads of one replica's tensor operations."""
    batch: BatchConfig = BatchConfig()
    """How the engine fills the network."""
    limits: LimitConfig = LimitConfig()
    """What one request may ask for."""
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
