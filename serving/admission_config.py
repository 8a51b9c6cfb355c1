"""Who may ask, for how much, and how much work may wait."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from serving.places import Place


class AdmissionConfig(BaseModel):
    """What is let in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: Place | None = None
    """The file of API keys that ``darkroom keys`` writes; read again when it changes. None asks for no key."""
    quotas: Place | None = None
    """A folder that all replicas share, where what keys have used is counted; None counts in each replica by itself
    and forgets when it ends."""
    max_waiting_s: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    """Seconds of the device's work, as predicted, that may wait in one replica; beyond, requests are refused. A request
    that finds nothing before it is never too large."""
    stall_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """A client that takes nothing of its answer, or sends nothing of its body, for so many seconds is left."""
