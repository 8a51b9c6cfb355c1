"""A model that is tried on real traffic before it replaces the one that serves."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

APPLICATION = "darkroom-candidate"
"""The name of its application in Serve."""
PATH = f"/{APPLICATION}"
"""Below it lies the candidate's route; there, the proxy says what it has measured."""


class CandidateConfig(BaseModel):
    """How much a candidate sees, and what it may not do. Serve's table of routes carries it to every proxy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern=r"[0-9a-f]{12}")
    """The first digits of its bundle's checksum: another candidate is measured anew."""
    kind: Literal["canary", "shadow"]
    """``canary`` answers clients; ``shadow`` gets a copy of what the model that serves has answered."""
    percent: float = Field(gt=0, le=100)
    """Share of the requests for pictures."""
    max_error_rate: float = Field(default=0.05, ge=0, lt=1)
    """Above this share of failed requests it gets no more of them."""
    min_requests: int = Field(default=20, ge=1)
    """Requests until that share is judged."""

    @property
    def route(self) -> str:
        """Its route prefix: the fields, in their order."""
        return "/".join([PATH, *(str(value) for value in self.model_dump().values())])

    @classmethod
    def from_route(cls, route: str) -> CandidateConfig | None:
        """What a route prefix says; None where it is not a candidate's."""
        values = route.removeprefix(f"{PATH}/").split("/")
        if not route.startswith(f"{PATH}/") or len(values) != len(cls.model_fields):
            return None
        try:
            return cls.model_validate(dict(zip(cls.model_fields, values, strict=True)))
        except ValidationError:
            return None


class Measured(BaseModel):
    """What one proxy has seen of a candidate: the answer to ``GET /darkroom-candidate``."""

    model_config = ConfigDict(frozen=True)

    route: str
    """The candidate's route prefix."""
    requests: int
    """Those that it was given and has ended with."""
    errors: int
    """Those that it failed: a status of 500 or more, a replica that died, a stream that broke."""
    refused: int
    """Those that it refused, with a status of 400 or more; as a canary, the model that serves answered them instead."""
    skipped: int
    """Copies that a shadow was not given: too many were on their way, or the body was too large to keep."""
    mean_s: float
    """Seconds of a request that did not fail, on average."""
    max_s: float
    """The slowest of them."""
    stopped: bool
    """It failed too many and gets no more."""
