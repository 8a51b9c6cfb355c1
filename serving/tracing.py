"""OpenTelemetry traces: one span for an HTTP request, one inside it for what the engine makes of it.

Off unless an exporter is named. A caller's W3C ``traceparent`` is accepted either way: its trace is in the logs.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from typing_extensions import override

from serving.errors import ServeError
from serving.observer import Outcome, RejectReason, Silent
from serving.schemas import GenerationRequest
from serving.telemetry_config import TelemetryConfig

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

_EXPORTERS = "opentelemetry_traces_exporter"
_INSTRUMENTATION = "darkroom.serving"
_propagator = TraceContextTextMapPropagator()


def caller(headers: Mapping[str, str]) -> Context:
    """The trace that a caller's ``traceparent`` and ``tracestate`` continue; one that is malformed is none."""
    return _propagator.extract(headers)


def exporter(name: str) -> SpanExporter:
    """An exporter that is installed, by the name of its entry point; it reads its own environment.

    Raises:
        ServeError: nobody installed it.
    """
    found = {point.name: point for point in entry_points(group=_EXPORTERS)}
    if name not in found:
        raise ServeError(
            "There is no such exporter of traces.",
            value=name,
            rule=f"the name of an installed entry point of {_EXPORTERS}",
            options=sorted(found),
        )
    made: SpanExporter = found[name].load()()
    return made


def provider(config: TelemetryConfig, *, model: str, to: SpanExporter) -> TracerProvider:
    """Where spans are made, sampled and handed to an exporter, off the event loop.

    Args:
        config: the share that is traced.
        model: of every span's resource.
        to: gets them.
    """
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    resource = Resource.create({"service.name": "darkroom", "darkroom.model": model})
    made = TracerProvider(sampler=ParentBased(TraceIdRatioBased(config.trace_share)), resource=resource)
    made.add_span_processor(BatchSpanProcessor(to))
    return made


class Tracing(Silent):
    """The spans of one server; an observer of its engine. Steps belong to many requests and make none.

    Args:
        provider: makes them.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer(_INSTRUMENTATION)
        self._making: dict[int, Span] = {}

    def close(self) -> None:
        """Hand over what the exporter has not got yet."""
        self._provider.shutdown()

    def received(self, method: str, context: Context, request_id: str) -> Span:
        """The span of an HTTP request; the route is known later."""
        attributes = {"http.request.method": method, "darkroom.request_id": request_id}
        return self._tracer.start_span(method, context, SpanKind.SERVER, attributes)

    @override
    def accepted(self, request: GenerationRequest) -> None:
        """Begin its span, inside that of the HTTP request whose task this is."""
        attributes: dict[str, str | int | float] = {
            "darkroom.images": request.images,
            "darkroom.steps": request.steps_left,
            "darkroom.size": request.size,
            "darkroom.guidance_scale": request.guidance_scale,
            "darkroom.sampler": request.sampler,
            "darkroom.priority": request.priority,
        }
        self._making[id(request)] = self._tracer.start_span("generate", attributes=attributes)

    @override
    def previewed(self, request: GenerationRequest, seconds_since_accepted: float) -> None:
        """Mark it."""
        if (span := self._making.get(id(request))) is not None:
            span.add_event("preview")

    @override
    def finished(self, request: GenerationRequest, seconds: float, outcome: Outcome) -> None:
        """End its span."""
        if (span := self._making.pop(id(request), None)) is not None:
            span.set_attribute("darkroom.outcome", outcome)
            if outcome == "failed":
                span.set_status(Status(StatusCode.ERROR))
            span.end()

    @override
    def rejected(self, reason: RejectReason) -> None:
        """Mark the HTTP request's span."""
        trace.get_current_span().add_event("rejected", {"darkroom.reason": reason})


def answered(span: Span, method: str, route: str, status: int) -> None:
    """End the span of an HTTP request."""
    span.update_name(f"{method} {route}")
    span.set_attributes({"http.route": route, "http.response.status_code": status})
    if status >= 500:
        span.set_status(Status(StatusCode.ERROR))
    span.end()
