"""The way to an MLflow server: does it answer, and a client whose calls end."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import urllib.request
from http.client import HTTPException
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from training.errors import TrackingError
from training.provenance import mask_logins

if TYPE_CHECKING:
    from mlflow import MlflowClient


def require_server(uri: str, timeout_s: float = 15.0) -> None:
    """Make sure that an MLflow server answers at ``uri``; does not import MLflow.

    Raises:
        TrackingError: it is no HTTP address, or nothing healthy answers there in time.
    """
    mend = "start it with `darkroom up`, or give the address of a running server"
    shown = mask_logins(uri)
    if not uri.startswith(("http://", "https://")):
        raise TrackingError("MLflow needs a server.", value=shown, rule="an address http(s)://host:port", mend=mend)
    try:
        proxies = [urllib.request.ProxyHandler({})] if _is_loopback(uri) else []
        with urllib.request.build_opener(*proxies).open(_health(uri), timeout=timeout_s) as response:
            body = response.read(64)
    except (OSError, ValueError, HTTPException) as error:
        why = mask_logins(str(getattr(error, "reason", None) or error))
        raise TrackingError(
            "The MLflow server cannot be reached.",
            value=shown,
            rule=f"GET /health within {timeout_s:g} s: {why}",
            mend=mend,
        ) from error
    if body.strip() != b"OK":
        raise TrackingError(
            "Something else than an MLflow server answers.", value=shown, rule="GET /health says OK", mend=mend
        )


def _health(uri: str) -> str:
    """The address of the health check, which asks for no login; urllib would take one for a part of the port."""
    parts = urlsplit(uri)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/") + "/health", "", ""))


def _is_loopback(uri: str) -> bool:
    """Whether a server of this machine is meant, which no proxy reaches."""
    host = urlsplit(uri).hostname or ""
    with contextlib.suppress(ValueError):  # a name
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _bypass_proxies(uri: str) -> None:
    """The environment is the only way to tell MLflow's client; what it says already is kept."""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    host = urlsplit(uri).hostname
    if host and host not in known.split(","):
        os.environ["no_proxy"] = ",".join(filter(None, [known, host]))


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
    if _is_loopback(uri):
        _bypass_proxies(uri)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)
