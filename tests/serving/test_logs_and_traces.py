"""Logs and traces: every line and span names its request, and nobody can write one of their own."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from serving import logs, tracing
from serving.app import create_app
from serving.config import BatchConfig, LimitConfig
from serving.engine import Engine
from serving.errors import ServeError
from serving.metrics import Metrics
from serving.metrics_prometheus import Prometheus
from serving.model import ModelCard
from serving.telemetry import Telemetry
from serving.telemetry_config import TelemetryConfig
from serving.tracing import Tracing
from tests.serving.live_server import serving, until
from training.canvas import Canvas
from training.objectives import Denoiser

CARD = ModelCard("tiny", 3, resolution=8, created=1_700_000_000, bundle_sha256="b" * 64)
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What is logged, as configured, until the test is over."""
    loggers = [logging.getLogger(name) for name in ("cluster", "serving", "training")]
    before = [(each.handlers, each.level, each.propagate) for each in loggers]
    yield io.StringIO()
    for each, (handlers, level, propagate) in zip(loggers, before, strict=True):
        each.handlers, each.propagate = handlers, propagate
        each.setLevel(level)


@contextmanager
def served(denoiser: Denoiser, encoder: Any, telemetry: Telemetry) -> Iterator[str]:
    engine = Engine(denoiser, encoder, canvas=Canvas(8), config=BatchConfig(padded_rows=2), observer=telemetry.observer)
    with serving(create_app(engine, CARD, LimitConfig(default_steps=2), telemetry=telemetry)) as port:
        yield f"http://127.0.0.1:{port}"


def lines(written: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written.getvalue().splitlines()]


def post(url: str, prompt: str = "a red circle", **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/images/generations", json={"prompt": prompt}, headers=headers, timeout=60)


def test_a_request_has_one_line_with_its_id_its_trace_and_no_prompt(
    denoiser: Denoiser, encoder: Any, written: io.StringIO
) -> None:
    logs.configure(TelemetryConfig(), model="tiny/3", stream=written)
    with served(denoiser, encoder, Telemetry.of(CARD)) as url:
        answer = post(url, "a secret circle", traceparent=TRACEPARENT)
        assert httpx.get(f"{url}/healthz").status_code == 200
        until(written.getvalue)
    (line,) = (each for each in lines(written) if "route" in each)
    assert line["request_id"] == answer.headers["x-request-id"]
    assert line["request_id"].startswith("req_")
    assert (line["level"], line["model"], line["trace_id"]) == ("info", "tiny/3", TRACE)
    assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/images/generations", 200)
    assert line["seconds"] > 0
    assert "secret" not in written.getvalue()


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/none", "/sdapi/v1/samplers", "/healthz", "/metrics", "/x"])
def test_every_dialect_answers_with_the_clients_own_id(denoiser: Denoiser, encoder: Any, path: str) -> None:
    with served(denoiser, encoder, Telemetry.of(CARD)) as url:
        kept = httpx.get(f"{url}{path}", headers={"x-request-id": "job-7:a.b_c"})
        drawn = httpx.get(f"{url}{path}", headers={"x-request-id": "job 7;{}"})
    assert kept.headers.get_list("x-request-id") == ["job-7:a.b_c"]
    assert drawn.headers["x-request-id"].startswith("req_")


def test_a_line_cannot_be_broken_and_carries_its_exception_and_extras(written: io.StringIO) -> None:
    logs.configure(TelemetryConfig(), model="tiny/3", stream=written)
    log = logging.getLogger("serving.some.module")
    try:
        raise ValueError("no")
    except ValueError:
        log.exception('a\n{"level": "info"}', extra={"rows": 7, "what": object})
    log.debug("too fine")
    (line,) = lines(written)
    assert line["message"] == 'a\n{"level": "info"}'
    assert (line["level"], line["logger"], line["rows"]) == ("error", "serving.some.module", 7)
    assert "ValueError: no" in line["exception"]
    assert line["time"].endswith("Z")


def test_text_lines_end_with_the_request(written: io.StringIO) -> None:
    logs.configure(TelemetryConfig(log_format="text", log_level="warning"), model="tiny/3", stream=written)
    named = logs.REQUEST_ID.set("req_1")
    logging.getLogger("serving.engine").warning("slow")
    logs.REQUEST_ID.reset(named)
    logging.getLogger("serving.engine").info("too fine")
    assert written.getvalue().endswith("WARNING slow [req_1]\n")


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


def traced(spans: InMemorySpanExporter, **settings: Any) -> Telemetry:
    config = TelemetryConfig(**settings)
    made = tracing.provider(config, model="tiny/3", to=spans)
    return Telemetry(Metrics(Prometheus(), model="tiny/3", bundle_sha256="b"), Tracing(made))


def by_name(spans: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in spans.get_finished_spans()}


def test_a_callers_trace_goes_on_through_the_request_into_the_engine(
    denoiser: Denoiser, encoder: Any, spans: InMemorySpanExporter
) -> None:
    with served(denoiser, encoder, traced(spans)) as url:
        answer = post(url, traceparent=TRACEPARENT)
    found = by_name(spans)
    outer, inner = found["POST /v1/images/generations"], found["generate"]
    assert outer.context is not None
    assert outer.parent is not None
    assert inner.parent is not None
    assert f"{outer.context.trace_id:032x}" == TRACE
    assert f"{outer.parent.span_id:016x}" == "00f067aa0ba902b7"
    assert inner.parent.span_id == outer.context.span_id
    assert outer.kind is SpanKind.SERVER
    assert outer.attributes is not None
    assert outer.attributes["darkroom.request_id"] == answer.headers["x-request-id"]
    assert outer.attributes["http.response.status_code"] == 200
    assert inner.attributes is not None
    assert (inner.attributes["darkroom.outcome"], inner.attributes["darkroom.steps"]) == ("done", 2)
    assert "circle" not in "".join(span.to_json() for span in found.values())


def test_what_is_refused_says_so_in_its_span(denoiser: Denoiser, encoder: Any, spans: InMemorySpanExporter) -> None:
    with served(denoiser, encoder, traced(spans)) as url:
        assert post(url, "word " * 30).status_code == 400
    (span,) = spans.get_finished_spans()
    assert [(event.name, dict(event.attributes or {})) for event in span.events] == [
        ("rejected", {"darkroom.reason": "invalid"})
    ]
    assert span.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize(("sampled", "count"), [("00", 0), ("01", 2)])
def test_the_caller_decides_whether_its_trace_is_taken(
    denoiser: Denoiser, encoder: Any, spans: InMemorySpanExporter, sampled: str, count: int
) -> None:
    with served(denoiser, encoder, traced(spans, trace_share=0.0)) as url:
        assert post(url).status_code == 200
        assert post(url, traceparent=TRACEPARENT[:-2] + sampled).status_code == 200
    assert len(spans.get_finished_spans()) == count


def test_a_traceparent_that_is_none_begins_a_new_trace(
    denoiser: Denoiser, encoder: Any, spans: InMemorySpanExporter
) -> None:
    with served(denoiser, encoder, traced(spans)) as url:
        assert post(url, traceparent="00-zz-1-01").status_code == 200
    assert by_name(spans)["POST /v1/images/generations"].parent is None


def test_there_are_no_spans_unless_an_exporter_is_named() -> None:
    assert Telemetry.of(CARD).tracing is None
    telemetry = Telemetry.of(CARD, TelemetryConfig(traces="console"))
    assert telemetry.tracing is not None
    telemetry.close()


def test_an_exporter_that_nobody_installed_is_refused_with_those_that_are() -> None:
    with pytest.raises(ServeError, match="no such exporter") as caught:
        Telemetry.of(CARD, TelemetryConfig(traces="jaeger"))
    assert "console" in caught.value.as_text()
    assert "jaeger" in caught.value.as_text()
