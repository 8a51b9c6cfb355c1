"""What a server tells about itself, and where."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TelemetryConfig(BaseModel):
    """Logs and traces; metrics are always there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    log_format: Literal["json", "text"] = "json"
    """One JSON object a line, or text for people."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What is not worth a line below it; at ``info`` every request has one, probes and scrapes excepted."""
    traces: str | None = Field(default=None, min_length=1)
    """The OpenTelemetry exporter that spans go to, by the name of its entry point: ``otlp``, ``console``; the
    environment's ``OTEL_EXPORTER_OTLP_ENDPOINT`` and the like say where. None makes no spans."""
    trace_share: float = Field(default=1.0, ge=0, le=1, allow_inf_nan=False)
    """Share of the requests without a ``traceparent`` that are traced; one with it has its caller's decision."""
