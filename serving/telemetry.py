"""What one server tells about itself, composed: metrics, logs and traces around the application and its engine."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.context import attach, detach
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import tracing
from serving.logs import REQUEST_ID
from serving.metrics import UNMATCHED, Metrics, Sink
from serving.metrics_prometheus import Prometheus
from serving.model import ModelCard
from serving.observer import Observer, Observers
from serving.telemetry_config import TelemetryConfig
from serving.tracing import Tracing

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_QUIET = ("/healthz", "/readyz", "/metrics")
"""Asked every few seconds by machines: a line only at ``debug``."""


class Telemetry:
    """Everything that watches one server.

    Args:
        metrics: counts.
        tracing: makes spans; None makes none.
        scraped: what ``GET /metrics`` answers from; None where another process is scraped.
    """

    def __init__(self, metrics: Metrics, tracing: Tracing | None = None, scraped: Prometheus | None = None) -> None:
        self.metrics = metrics
        self.tracing = tracing
        self.scraped = scraped

    @classmethod
    def of(cls, card: ModelCard, config: TelemetryConfig | None = None, sink: Sink | None = None) -> Telemetry:
        """For a model's server.

        Args:
            card: the model, in every label and span.
            config: whether there are traces.
            sink: where metrics go; None keeps them here and answers ``GET /metrics``.

        Raises:
            ServeError: the exporter of traces is not installed.
        """
        config = config or TelemetryConfig()
        scraped = Prometheus() if sink is None else None
        metrics = Metrics(sink or scraped or Prometheus(), model=card.names[-1], bundle_sha256=card.bundle_sha256)
        if config.traces is None:
            return cls(metrics, None, scraped)
        to = tracing.exporter(config.traces)
        return cls(metrics, Tracing(tracing.provider(config, model=card.names[-1], to=to)), scraped)

    @property
    def observer(self) -> Observer:
        """For the engine."""
        return self.metrics if self.tracing is None else Observers(self.metrics, self.tracing)

    def close(self) -> None:
        """Hand over what is not yet told."""
        if self.tracing is not None:
            self.tracing.close()


class Watched:
    """ASGI middleware: a request has an id, a trace, a line in the log and a place in the metrics.

    A client's own ``x-request-id`` is kept where it is well-formed; else the one drawn here replaces it, for whatever
    names the response.

    Args:
        app: the application; it sees the very scope that is given here, whose route is read afterwards.
        telemetry: is told.
    """

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self.app = app
        self.telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, watching."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500  # of a response that never begins

        async def send_seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with self._context(scope) as span:
            started = time.monotonic()
            try:
                await self.app(scope, receive, send_seen)
            finally:
                self._told(scope, status, time.monotonic() - started, span)

    @contextmanager
    def _context(self, scope: Scope) -> Iterator[trace.Span | None]:
        """The request's id and trace, in this task and in all that it starts."""
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = f"req_{secrets.token_hex(12)}"
            MutableHeaders(scope=scope)["x-request-id"] = request_id
        context = tracing.caller(headers)
        span = None
        if self.telemetry.tracing is not None:
            span = self.telemetry.tracing.received(scope["method"], context, request_id)
            context = trace.set_span_in_context(span, context)
        named, attached = REQUEST_ID.set(request_id), attach(context)
        try:
            yield span
        finally:
            detach(attached)
            REQUEST_ID.reset(named)

    def _told(self, scope: Scope, status: int, seconds: float, span: trace.Span | None) -> None:
        route = getattr(scope.get("route"), "path", UNMATCHED)
        self.telemetry.metrics.answered(route, status, seconds)
        log.log(
            logging.DEBUG if route in _QUIET else logging.INFO,
            "%s %s %d in %.3f s",
            scope["method"],
            route,
            status,
            seconds,
            extra={"method": scope["method"], "route": route, "status": status, "seconds": round(seconds, 4)},
        )
        if span is not None:
            tracing.answered(span, scope["method"], route, status)
