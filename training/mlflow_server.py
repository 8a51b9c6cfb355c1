"""The way to an MLflow server: does it answer, and a client whose calls end."""

from __future__ import annotations

import os
import urllib.request
from typing import TYPE_CHECKING

from training.errors import TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient


def require_server(uri: str, timeout_s: float = 15.0) -> None:
    """Make sure that an MLflow server answers at ``uri``; does not import MLflow.

    Raises:
        TrackingError: it is no HTTP address, or nothing healthy answers there in time.
    """
    mend = "start it with `darkroom up`, or give the address of a running server"
    if not uri.startswith(("http://", "https://")):
        raise TrackingError("MLflow needs a server.", value=uri, rule="an address http(s)://host:port", mend=mend)
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=timeout_s) as response:  # noqa: S310 -- http(s) only
            body = response.read(64)
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or error
        raise TrackingError(
            "The MLflow server cannot be reached.",
            value=uri,
            rule=f"GET /health within {timeout_s:g} s: {why}",
            mend=mend,
        ) from error
    if body.strip() != b"OK":
        raise TrackingError(
            "Something else than an MLflow server answers.", value=uri, rule="GET /health says OK", mend=mend
        )


def connect(uri: str) -> MlflowClient:
    """A client whose calls end: MLflow's own defaults retry a dead server for minutes.

    Its limits can only be given as environment variables; values that the user has set are kept.
    """
    # nobody asked this machine to report to MLflow's makers, from a thread of its own
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # a run's address belongs to the command that started it, not in the output of every rank and trial
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)
