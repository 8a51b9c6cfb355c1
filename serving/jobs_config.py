"""Jobs: where they are kept, for how long, and whom they may call."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from serving.places import Place


class JobsConfig(BaseModel):
    """The jobs API."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Place | None = None
    """Where jobs and their pictures are: a folder that all replicas share. None is a folder of one replica's own, which
    goes when it ends; another replica then knows nothing of its jobs."""
    results_kept_s: float = Field(default=86_400.0, gt=0, allow_inf_nan=False)
    """Seconds after its end for which a job can be asked for."""
    max_bytes: int = Field(default=10_000_000_000, ge=1_000_000)
    """Of all jobs together. Where it is exceeded, those that ended first go first, before their time."""
    lease_s: float = Field(default=10.0, gt=0.1, allow_inf_nan=False)
    """A replica that shows no sign of life for so many seconds has lost its jobs to the others. The machines' clocks
    agree to less than that."""
    max_attempts: int = Field(default=5, ge=1)
    """Replicas that may be lost over one job; then it has failed."""
    webhook_secret: Place | None = None
    """A file with a secret of at least 32 characters, of which each API key's own webhook secret is made; None calls
    no webhooks."""
    webhook_private: bool = False
    """Let webhooks reach addresses that are not public: the private networks, this machine."""
    webhook_pauses_s: tuple[float, ...] = (5, 30, 120, 600, 3600)
    """Seconds between two tries to deliver a webhook; after the last try it is given up."""
