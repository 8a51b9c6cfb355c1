"""Metrics: what the engine does is in them, labels stay few, and whatever is drawn or alarmed on exists."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from serving.app import create_app
from serving.config import BatchConfig, LimitConfig
from serving.engine import Engine
from serving.metrics import METRICS, SIDE_CLASSES, STEP_CLASSES, Metrics, size_class, step_class
from serving.metrics_prometheus import Prometheus
from serving.model import ModelCard
from serving.schemas import GenerationRequest
from serving.telemetry import Telemetry
from tests.serving.live_server import serving, until
from training.canvas import Canvas
from training.objectives import Denoiser

MONITORING = Path(__file__).parents[2] / "infra" / "monitoring"
CARD = ModelCard("tiny", 3, resolution=8, created=1_700_000_000, bundle_sha256="b" * 64)
REQUEST = GenerationRequest(prompt="x", seed=1, steps=20, width=512, height=512, images=2)


@pytest.fixture
def url(denoiser: Denoiser, encoder: Any) -> Iterator[str]:
    telemetry = Telemetry.of(CARD)
    config = BatchConfig(padded_rows=2, max_batch_rows=4, max_waiting_images=4)
    engine = Engine(denoiser, encoder, canvas=Canvas(8), config=config, observer=telemetry.observer)
    with serving(create_app(engine, CARD, LimitConfig(max_steps=1000), telemetry=telemetry)) as port:
        yield f"http://127.0.0.1:{port}"


def scraped(url: str, accept: str = "text/plain") -> dict[tuple[str, ...], float]:
    """Every sample by its name and its labels' values in the order of the labels' names, the model's left out."""
    answer = httpx.get(f"{url}/metrics", headers={"accept": accept})
    assert answer.headers["content-type"].startswith(accept)
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            if sample.name.startswith("darkroom_"):
                assert sample.labels.pop("model") == "tiny/3"
            found[(sample.name, *(sample.labels[name] for name in sorted(sample.labels)))] = sample.value
    return found


def generate(url: str, **body: Any) -> httpx.Response:
    body = {"prompt": "a red circle", "num_inference_steps": 5, "guidance_scale": 1, **body}
    return httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)


def test_what_requests_cost_is_scraped_from_the_server(url: str) -> None:
    assert generate(url).status_code == 200
    assert generate(url, n=2, guidance_scale=2, stream=True, partial_images=1).status_code == 200
    assert generate(url, prompt="word " * 30).status_code == 400
    assert httpx.get(f"{url}/no/such/page").status_code == 404
    until(lambda: scraped(url)[("darkroom_finished_total", "done")] == 2)
    found = scraped(url)
    assert found[("darkroom_model_info", "b" * 64)] == 1
    assert found[("darkroom_accepted_total",)] == 2
    assert found[("darkroom_rejected_total", "invalid")] == 1
    assert found[("darkroom_images_total",)] == 3
    assert found[("darkroom_rows_total", "64")] == 5 + 2 * 2 * 5
    assert found[("darkroom_padding_rows_total", "64")] == 5  # the first image was alone, in calls of two rows
    assert found[("darkroom_batch_fill_bucket", "0.5", "64")] == 5
    steps = found[("darkroom_step_seconds_count", "64")]
    assert steps == found[("darkroom_batch_fill_count", "64")] == 5 + 10
    assert found[("darkroom_first_preview_seconds_count",)] == 1
    assert found[("darkroom_request_seconds_count", "64", "8")] == 2
    assert found[("darkroom_http_seconds_count", "/v1/images/generations", "200")] == 2
    assert found[("darkroom_http_seconds_count", "/v1/images/generations", "400")] == 1
    assert found[("darkroom_http_seconds_count", "unmatched", "404")] == 1
    assert found[("darkroom_waiting_images",)] == found[("darkroom_running_images",)] == 0
    assert found[("process_open_fds",)] > 0


def test_openmetrics_is_told_where_it_is_asked_for(url: str) -> None:
    answer = httpx.get(f"{url}/metrics", headers={"accept": "application/openmetrics-text"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_labels_stay_few_whatever_is_asked() -> None:
    sides = {size_class(width, height) for width in range(1, 5000, 97) for height in range(1, 5000, 89)}
    steps = {step_class(each) for each in range(1, 2000)}
    assert sides == {*map(str, SIDE_CLASSES), "more"}
    assert steps == {*map(str, STEP_CLASSES), "more"}
    assert size_class(1024, 256) == "512"
    assert step_class(21) == "50"


def test_a_reason_that_nobody_knows_is_no_series_of_its_own() -> None:
    sink = Prometheus()
    metrics = Metrics(sink, model="tiny/3", bundle_sha256="b")
    for number in range(3):
        metrics.rejected(f"reason {number}")  # type: ignore[arg-type]
    metrics.rejected("quota")
    labels = {"model": "tiny/3", "reason": "other"}
    assert sink.registry.get_sample_value("darkroom_rejected_total", labels) == 3
    assert sink.registry.get_sample_value("darkroom_rejected_total", {**labels, "reason": "quota"}) == 1


def test_only_the_first_preview_is_timed_and_only_what_is_done() -> None:
    sink = Prometheus()
    metrics = Metrics(sink, model="m", bundle_sha256="b")
    metrics.accepted(REQUEST)
    metrics.previewed(REQUEST, 0.5)
    metrics.previewed(REQUEST, 0.9)
    metrics.finished(REQUEST, 1.0, "cancelled")
    assert sink.registry.get_sample_value("darkroom_first_preview_seconds_sum", {"model": "m"}) == 0.5
    assert sink.registry.get_sample_value("darkroom_images_total", {"model": "m"}) is None
    labels = {"model": "m", "outcome": "cancelled"}
    assert sink.registry.get_sample_value("darkroom_finished_total", labels) == 1


def test_two_models_of_one_process_are_told_apart() -> None:
    sink = Prometheus()
    for model in ("one/1", "two/1"):
        Metrics(sink, model=model, bundle_sha256="b").stepped(8, 8, 3, 4, 0.5)
        assert sink.registry.get_sample_value("darkroom_padding_seconds_total", {"model": model}) == 0.125


SUFFIX = re.compile(r"_(bucket|sum|count)$")
NAMES = {metric.name: metric for metric in METRICS}


def named(expressions: list[str]) -> set[str]:
    return {name for each in expressions for name in re.findall(r"darkroom_[a-z_]+", each)}


def existing(name: str) -> str:
    """The metric that a series belongs to."""
    bare = SUFFIX.sub("", name)
    metric = NAMES[bare if bare in NAMES and NAMES[bare].kind == "histogram" else name]
    assert (bare != name) == (metric.kind == "histogram"), f"{name} is no series of a {metric.kind}"
    return metric.name


def drawn() -> list[str]:
    board = json.loads((MONITORING / "darkroom-serving.json").read_text())
    targets = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return [*targets, *(variable["query"] for variable in board["templating"]["list"])]


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_the_dashboard_draws_every_metric_and_none_that_there_is_not() -> None:
    assert {existing(name) for name in named(drawn())} == set(NAMES)


def test_alerts_name_metrics_and_labels_that_there_are() -> None:
    for rule in rules():
        expression = rule["expr"]
        for name in named([expression]):
            labels = {"instance", "le", *NAMES[existing(name)].labels}
            asked = re.findall(r"(\w+)(?:=~|=)", expression) + re.findall(r"by \(([\w, ]+)\)", expression)
            for label in {part.strip() for each in asked for part in each.split(",")} - {"__name__"}:
                assert label in labels or len(named([expression])) > 1, f"{rule['alert']}: {label}"
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["mend"]
        assert rule["labels"]["severity"] in {"critical", "warning"}


def test_panels_do_not_overlap() -> None:
    taken = set()
    for panel in json.loads((MONITORING / "darkroom-serving.json").read_text())["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells
