"""The outbox between a training loop and MLflow: it takes records at once and delivers them when it can."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError

from training.provenance import mask_logins

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from PIL import Image

_log = logging.getLogger(__name__)
_TICK_S = 1.0
_CLOSING_RETRY_S = 0.5
_VALUES_PER_REQUEST = 500  # MLflow refuses more than 1000
_ATTEMPTS = 5


def _now_ms() -> int:
    return int(time.time() * 1000)


@dataclass(frozen=True)
class Metrics:
    """Values of one step."""

    step: int
    values: Mapping[str, float]
    timestamp_ms: int = field(default_factory=_now_ms)


@dataclass(frozen=True)
class Picture:
    """One picture of MLflow's image grid."""

    image: Image.Image
    key: str
    step: int
    timestamp_ms: int = field(default_factory=_now_ms)

    def send(self, client: MlflowClient, run_id: str) -> None:
        """Deliver it."""
        client.log_image(
            run_id, self.image, key=self.key, step=self.step, timestamp=self.timestamp_ms, synchronous=True
        )


@dataclass(frozen=True)
class Tag:
    """A tag of the run; a later value replaces it."""

    name: str
    value: str

    def send(self, client: MlflowClient, run_id: str) -> None:
        """Deliver it."""
        client.set_tag(run_id, self.name, self.value, synchronous=True)


@dataclass(frozen=True)
class Artifact:
    """A file or directory for the run's artifacts."""

    path: Path
    folder: str | None

    def send(self, client: MlflowClient, run_id: str) -> None:
        """Deliver it."""
        deliver = client.log_artifacts if self.path.is_dir() else client.log_artifact
        deliver(run_id, str(self.path), self.folder)


@dataclass(frozen=True)
class Status:
    """How the run ended."""

    status: str
    timestamp_ms: int = field(default_factory=_now_ms)

    def send(self, client: MlflowClient, run_id: str) -> None:
        """Deliver it."""
        client.set_terminated(run_id, self.status, end_time=self.timestamp_ms)


Record = Metrics | Picture | Tag | Artifact | Status


class Outbox:
    """Delivers records in order from one background thread.

    While the server is away, records wait in memory, a warning is logged once, and delivery is tried again every
    second. A record that the server refuses is named in a warning, counted and left behind: it never holds up the
    others.

    Args:
        client: connected to the server, with bounded retries and timeouts of its own.
        run_id: the run that gets the records.
        is_up: tells whether the server answers at all.
    """

    def __init__(self, client: MlflowClient, run_id: str, *, is_up: Callable[[], bool]) -> None:
        self._client = client
        self._run_id = run_id
        self._is_up = is_up
        self._on_tick: Callable[[], None] = _nothing
        self._waiting: deque[Record] = deque()
        self._refused = 0
        self._attempts = 0
        self._away = False
        self._closing = threading.Event()
        self._given_up = threading.Event()
        # a daemon: a server that hangs must not keep a finished training process alive
        self._thread = threading.Thread(target=self._run, name="mlflow-outbox", daemon=True)

    def start(self, on_tick: Callable[[], None]) -> None:
        """Begin to deliver.

        Args:
            on_tick: called about once a second in the thread, e.g. to sample system metrics.
        """
        self._on_tick = on_tick
        self._thread.start()

    def put(self, record: Record) -> None:
        """Take a record; never waits for the server."""
        self._waiting.append(record)

    def close(self, timeout_s: float) -> int:
        """Deliver what is waiting, for at most ``timeout_s``.

        Returns:
            How many records were not delivered: refused, or still waiting.
        """
        self._closing.set()
        self._thread.join(timeout_s)
        self._given_up.set()
        undelivered = self._refused + len(self._waiting)
        if undelivered:
            _log.warning("MLflow did not take %d records of run %s.", undelivered, self._run_id)
        return undelivered

    def _run(self) -> None:
        self._tick()
        while not self._closing.wait(_TICK_S):
            self._tick()
            self._flush()
        while not self._flush():
            if self._given_up.wait(_CLOSING_RETRY_S):
                return

    def _tick(self) -> None:
        try:
            self._on_tick()
        except Exception as error:  # noqa: BLE001 -- sampling is a courtesy; delivery must go on without it
            _log.warning("System metrics stop: %s", _short(error))
            self._on_tick = _nothing

    def _flush(self) -> bool:
        """Deliver until nothing is waiting (True) or the server is away (False)."""
        while self._waiting:
            count, error = self._attempt()
            if error is not None and self._holds(error):
                return False
            for _ in range(count):
                self._waiting.popleft()
            if error is not None:
                self._refused += count
            elif self._away:
                _log.warning("MLflow is back; %d waiting records follow.", len(self._waiting))
                self._away = False
            self._attempts = 0
        return True

    def _attempt(self) -> tuple[int, Exception | None]:
        """Send the first record, or the first run of metrics together: how many it was, and what went wrong."""
        first = self._waiting[0]
        batch = self._leading_metrics() if isinstance(first, Metrics) else [first]
        try:
            if isinstance(first, Metrics):
                self._send_metrics([record for record in batch if isinstance(record, Metrics)])
            else:
                first.send(self._client, self._run_id)
        except Exception as error:  # noqa: BLE001 -- _holds reports it; it must end neither the thread nor the run
            return len(batch), error
        return len(batch), None

    def _leading_metrics(self) -> list[Record]:
        batch: list[Record] = []
        values = 0
        for record in list(self._waiting):
            if not isinstance(record, Metrics) or (batch and values + len(record.values) > _VALUES_PER_REQUEST):
                break
            batch.append(record)
            values += len(record.values)
        return batch

    def _send_metrics(self, batch: list[Metrics]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, float(value), record.timestamp_ms, record.step)
            for record in batch
            for name, value in record.values.items()
        ]
        self._client.log_batch(self._run_id, metrics=metrics, synchronous=True)

    def _holds(self, error: Exception) -> bool:
        """Whether the failed record should wait; if not, it is refused. Says so in the log, once per outage."""
        if not is_refusal(error):
            if not self._is_up():
                if not self._away:
                    _log.warning("MLflow is away; metrics wait here and go on to metrics.jsonl. (%s)", _short(error))
                self._away = True
                return True
            self._attempts += 1
            if self._attempts < _ATTEMPTS:
                return True
        _log.warning("MLflow refused a record of run %s: %s", self._run_id, _short(error))
        return False


def _nothing() -> None:
    """Nothing to sample any more."""


def _short(error: Exception) -> str:
    text = mask_logins(" ".join(f"{type(error).__name__}: {error}".split()))
    return text if len(text) <= 200 else text[:197] + "..."


def is_refusal(error: BaseException) -> bool:
    """Whether trying again cannot help: a client-side mistake, or HTTP 4xx other than timeout and too many."""
    import requests
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        status: int = error.get_http_status_code()  # type: ignore[no-untyped-call]
    elif isinstance(error, requests.HTTPError) and error.response is not None:
        status = error.response.status_code
    else:
        return not isinstance(error, (requests.RequestException, URLError, ConnectionError, TimeoutError))
    return 400 <= status < 500 and status not in {408, 429}
