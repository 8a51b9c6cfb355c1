"""The server's metrics: which there are, and what the engine's and the API's events are in them.

Each is declared once and recorded through a sink: Prometheus' client in a process of its own
(``serving.metrics_prometheus``), Ray's agent where Ray Serve runs the replica (``serving.deployment_metrics``), which
puts ``ray_`` before the names. Labels take a few dozen values at most, whatever is asked: sizes and step counts are
counted in classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from typing_extensions import override

from serving.observer import Outcome, RejectReason, Silent
from serving.schemas import GenerationRequest

STEP_CLASSES = (4, 8, 20, 50, 100)
"""Upper ends of the classes of denoising steps."""
SIDE_CLASSES = (64, 128, 256, 512, 1024, 2048)
"""Upper ends of the classes of pictures' sizes: sides of the square with as many pixels."""
BEYOND = "more"
"""What lies above the last class."""
UNMATCHED = "unmatched"
"""The route of a path that there is not."""

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


@dataclass(frozen=True)
class Metric:
    """One metric; every one has the label ``model``, which is ``name/version``.

    Attributes:
        name: in Prometheus' spelling; a counter's ends with ``_total``.
        kind: whether values add up, replace each other or are distributed.
        help: what it is, with its unit.
        more_labels: beside ``model``.
        buckets: upper ends of a histogram's buckets.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    more_labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """All of its labels."""
        return ("model", *self.more_labels)


INFO = Metric("darkroom_model_info", "gauge", "1, with the weights that are served.", ("bundle_sha256",))
WAITING = Metric("darkroom_waiting_images", "gauge", "Images accepted and not yet being denoised.")
RUNNING = Metric("darkroom_running_images", "gauge", "Images being denoised.")
RUNNING_ROWS = Metric("darkroom_running_rows", "gauge", "Rows of requests in the latest step; a guided image has two.")
ACCEPTED = Metric("darkroom_accepted_total", "counter", "Requests accepted.")
REJECTED = Metric("darkroom_rejected_total", "counter", "Requests refused before they were accepted.", ("reason",))
FINISHED = Metric("darkroom_finished_total", "counter", "Accepted requests that are over.", ("outcome",))
IMAGES = Metric("darkroom_images_total", "counter", "Images of requests that were done.")
ROWS = Metric("darkroom_rows_total", "counter", "Rows denoised for requests, one for each step.", ("size",))
PADDING_ROWS = Metric("darkroom_padding_rows_total", "counter", "Rows denoised to fill a call up.", ("size",))
PADDING_SECONDS = Metric(
    "darkroom_padding_seconds_total", "counter", "Seconds of steps that padding took, by its share of the rows."
)
FILL = Metric(
    "darkroom_batch_fill", "histogram", "Requests' share of a step's rows, 0 to 1.", ("size",), buckets=_SHARES
)
STEP = Metric("darkroom_step_seconds", "histogram", "Seconds of one denoising step.", ("size",), buckets=_STEP_SECONDS)
FIRST_PREVIEW = Metric(
    "darkroom_first_preview_seconds", "histogram", "Seconds from acceptance to the first preview.", buckets=_SECONDS
)
REQUEST = Metric(
    "darkroom_request_seconds",
    "histogram",
    "Seconds from acceptance to the last image, of requests that were done.",
    ("steps", "size"),
    buckets=_SECONDS,
)
HTTP = Metric(
    "darkroom_http_seconds", "histogram", "Seconds of one HTTP request.", ("route", "status"), buckets=_SECONDS
)
METRICS = (
    INFO,
    WAITING,
    RUNNING,
    RUNNING_ROWS,
    ACCEPTED,
    REJECTED,
    FINISHED,
    IMAGES,
    ROWS,
    PADDING_ROWS,
    PADDING_SECONDS,
    FILL,
    STEP,
    FIRST_PREVIEW,
    REQUEST,
    HTTP,
)
"""All of them."""

Record = Callable[[float, dict[str, str]], None]
"""Adds to a counter, sets a gauge or observes a histogram's value, for these labels."""
Sink = Callable[[Metric], Record]
"""Declares a metric; asked again for the same one it answers the same."""


class Metrics(Silent):
    """An observer of one engine, and of the API before it.

    Args:
        sink: where values go.
        model: ``name/version``.
        bundle_sha256: of the weights.
    """

    def __init__(self, sink: Sink, *, model: str, bundle_sha256: str) -> None:
        self._model = model
        self._records = {metric.name: sink(metric) for metric in METRICS}
        self._previewed: set[int] = set()
        self._tell(INFO, 1, bundle_sha256=bundle_sha256)
        for gauge in (WAITING, RUNNING, RUNNING_ROWS):
            self._tell(gauge, 0)

    def _tell(self, metric: Metric, value: float, **labels: str) -> None:
        self._records[metric.name](value, {"model": self._model, **labels})

    @override
    def accepted(self, request: GenerationRequest) -> None:
        """Count it."""
        self._tell(ACCEPTED, 1)

    @override
    def rejected(self, reason: RejectReason) -> None:
        """Count it by its reason."""
        self._tell(REJECTED, 1, reason=_known(reason, get_args(RejectReason)))

    @override
    def stepped(self, width: int, height: int, rows: int, padded_rows: int, seconds: float) -> None:
        """Count its rows, and what padding cost."""
        size = size_class(width, height)
        padding = padded_rows - rows
        self._tell(RUNNING_ROWS, rows)
        self._tell(STEP, seconds, size=size)
        self._tell(FILL, rows / padded_rows, size=size)
        self._tell(ROWS, rows, size=size)
        if padding:
            self._tell(PADDING_ROWS, padding, size=size)
            self._tell(PADDING_SECONDS, seconds * padding / padded_rows)

    @override
    def previewed(self, request: GenerationRequest, seconds_since_accepted: float) -> None:
        """Time the first one."""
        if id(request) not in self._previewed:
            self._previewed.add(id(request))
            self._tell(FIRST_PREVIEW, seconds_since_accepted)

    @override
    def finished(self, request: GenerationRequest, seconds: float, outcome: Outcome) -> None:
        """Count it by its outcome, and time it where all of its images were made."""
        self._previewed.discard(id(request))
        self._tell(FINISHED, 1, outcome=_known(outcome, get_args(Outcome)))
        if outcome == "done":
            size = size_class(request.width, request.height)
            self._tell(IMAGES, request.images)
            self._tell(REQUEST, seconds, steps=step_class(request.steps_left), size=size)

    @override
    def waiting(self, images: int, running: int) -> None:
        """Show both."""
        self._tell(WAITING, images)
        self._tell(RUNNING, running)
        if not running:
            self._tell(RUNNING_ROWS, 0)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Time an HTTP request.

        Args:
            route: the route's template, never the path that was asked.
            status: the response's.
            seconds: from its first byte here to its last one.
        """
        self._tell(HTTP, seconds, route=route, status=str(status))


def step_class(steps: int) -> str:
    """The class of a number of denoising steps: the smallest of ``STEP_CLASSES`` that holds it."""
    return _class(steps, STEP_CLASSES)


def size_class(width: int, height: int) -> str:
    """The class of a picture's size: the smallest of ``SIDE_CLASSES`` whose square has as many pixels."""
    return _class(math.sqrt(width * height), SIDE_CLASSES)


def _class(value: float, ends: tuple[int, ...]) -> str:
    return str(next((end for end in ends if value <= end), BEYOND))


def _known(value: str, values: tuple[str, ...]) -> str:
    return value if value in values else "other"
