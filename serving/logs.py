"""Logs with the request in every line: JSON for machines, text for people.

Prompts, keys and pictures are in no line.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import Any, TextIO

from opentelemetry import trace

from serving.telemetry_config import TelemetryConfig

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The request that this task works for."""

_USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_OURS = ("cluster", "serving", "training")


def request_fields() -> dict[str, str]:
    """The request that this task works for, and its trace; without those that there are not."""
    fields = {}
    if (request_id := REQUEST_ID.get()) is not None:
        fields["request_id"] = request_id
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        fields |= {"trace_id": f"{span.trace_id:032x}", "span_id": f"{span.span_id:016x}"}
    return fields


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, the request, what ``extra`` names, the exception.

    Args:
        fields: in every line, such as the model.
    """

    def __init__(self, **fields: str) -> None:
        super().__init__()
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        """The line; a client's line breaks are escaped, so nobody can write a line of their own."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._fields,
            **request_fields(),
            **{name: value for name, value in vars(record).items() if name not in _USUAL},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """Time, level, message and request id."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The line, with the request at its end."""
        line = super().format(record)
        request_id = REQUEST_ID.get()
        return line if request_id is None else f"{line} [{request_id}]"


def configure(config: TelemetryConfig, *, model: str, stream: TextIO | None = None) -> logging.Handler:
    """Send the logs of this project's packages to a stream, and nowhere else; called once a process, by who owns it.

    Args:
        config: the format and the level.
        model: in every JSON line.
        stream: standard error unless given.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonLines(model=model) if config.log_format == "json" else TextLines())
    for name in _OURS:
        logger = logging.getLogger(name)
        logger.setLevel(config.log_level.upper())
        logger.handlers = [handler]
        logger.propagate = False
    return handler
