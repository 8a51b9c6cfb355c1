"""How strangers' URLs are asked."""

from __future__ import annotations

import ipaddress

from pydantic import BaseModel, ConfigDict, Field, field_validator


class DownloadConfig(BaseModel):
    """Limits on what a URL may cost, and whom it may reach."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    obey_noai: bool = True
    """Drop a picture whose ``X-Robots-Tag`` says ``noai`` or ``noimageai``."""
    allow_networks: tuple[str, ...] = ()
    """Private networks that may be reached, as ``10.0.0.0/8`` or ``192.168.1.7``; by default none: an address that is
    not on the open internet is refused after the name was looked up, on every redirect."""
    connect_timeout_s: float = Field(default=10.0, gt=0)
    """How long looking up and connecting may take."""
    read_timeout_s: float = Field(default=20.0, gt=0)
    """How long a server may be silent."""
    total_timeout_s: float = Field(default=120.0, gt=0)
    """How long one picture may take, redirects, retries and their pauses together."""
    max_redirects: int = Field(default=5, ge=0)
    """Redirects that are followed for one picture."""
    retries: int = Field(default=3, ge=0)
    """Further attempts after a failure that may pass: 408, 429, 5xx, broken connections, silence."""
    retry_wait_s: float = Field(default=1.0, ge=0)
    """The pause before the first further attempt; each one after it is twice as long."""
    max_retry_after_s: float = Field(default=60.0, ge=0)
    """A server that asks for a longer rest than this is not asked again."""
    per_host: int = Field(default=4, ge=1)
    """Downloads from one host at once, in each process."""
    user_agent: str = Field(default="Darkroom/0.1 (image data set builder)", pattern="^[ -~]+$")
    """Who asks."""

    @field_validator("allow_networks")
    @classmethod
    def _networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(ipaddress.ip_network(network)) for network in networks)
