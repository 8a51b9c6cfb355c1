"""Metrics in a process of its own: Prometheus' client, and ``GET /metrics`` for whoever scrapes."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder

from serving.metrics import Metric, Record


class Prometheus:
    """A sink with a registry of its own, so that two servers in one process do not mix; it tells of the process too."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._declared: dict[str, Record] = {}
        ProcessCollector(registry=self.registry)

    def __call__(self, metric: Metric) -> Record:
        """Declare a metric."""
        if metric.name not in self._declared:
            self._declared[metric.name] = self._declare(metric)
        return self._declared[metric.name]

    def _declare(self, metric: Metric) -> Record:
        told: dict[str, Any] = {
            "name": metric.name,
            "documentation": metric.help,
            "labelnames": metric.labels,
            "registry": self.registry,
        }
        if metric.kind == "counter":
            counter = Counter(**told)
            return lambda value, labels: counter.labels(**labels).inc(value)
        if metric.kind == "gauge":
            gauge = Gauge(**told)
            return lambda value, labels: gauge.labels(**labels).set(value)
        histogram = Histogram(**told, buckets=metric.buckets)
        return lambda value, labels: histogram.labels(**labels).observe(value)

    def router(self) -> APIRouter:
        """``GET /metrics``, in Prometheus' text format, or in OpenMetrics where it is asked for."""
        router = APIRouter(tags=["health"])
        contents: dict[str, Any] = {"text/plain": {}, "application/openmetrics-text": {}}

        @router.get("/metrics", response_class=Response, responses={200: {"content": contents}})
        async def metrics(request: Request) -> Response:
            """What this process has counted."""
            encode, content_type = choose_encoder(request.headers.get("accept", ""))
            return Response(encode(self.registry), media_type=content_type)

        return router
