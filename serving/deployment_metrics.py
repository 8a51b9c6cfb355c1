"""Metrics of a replica that Ray Serve runs: to Ray's agent on its node, which is what gets scraped.

``GET /metrics`` through Serve's proxy would reach any one replica. The agent has those of all of a node, with the
labels ``application``, ``deployment`` and ``replica``, and Ray writes the list of agents for Prometheus to discover.
"""

from __future__ import annotations

from typing import Any

from ray.serve import metrics as serve_metrics

from serving.metrics import Metric, Record


def ray_sink(metric: Metric) -> Record:
    """Declare a metric; inside a replica only."""
    labels_of: Any = metric.labels  # Serve's own types say one label
    if metric.kind == "counter":
        counter = serve_metrics.Counter(metric.name, metric.help, tag_keys=labels_of)
        return lambda value, labels: counter.inc(value, tags=labels)
    if metric.kind == "gauge":
        gauge = serve_metrics.Gauge(metric.name, metric.help, tag_keys=labels_of)
        return lambda value, labels: gauge.set(value, tags=labels)
    histogram = serve_metrics.Histogram(metric.name, metric.help, boundaries=list(metric.buckets), tag_keys=labels_of)
    return lambda value, labels: histogram.observe(value, tags=labels)
