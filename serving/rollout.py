"""What Serve's status says, and whether an endpoint can be had and answers; plain data and HTTP, no Ray."""

from __future__ import annotations

import os
import re
import socket
import time
from typing import Any
from urllib.parse import urlsplit

from serving.config import ServeConfig
from serving.errors import ServeError

APPLICATION = "darkroom"
"""The name of our application in Serve; others on the same cluster are left alone."""
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
"""Hosts that only this machine reaches."""
POLL_S = 0.25
"""Seconds between two looks."""
_TYPED_ERROR = re.compile(r"^(?:ray\.\S+: )?(?:\w+\.)+\w*Error: ", re.MULTILINE)


def others(details: dict[str, Any]) -> list[dict[str, Any]]:
    """Everybody else's applications: declaring ours without them would remove them."""
    applications = details["applications"].items()
    return [
        app["deployed_app_config"] for name, app in applications if name != APPLICATION and app["deployed_app_config"]
    ]


def check_port(details: dict[str, Any], dashboard_url: str, config: ServeConfig) -> None:
    """A port is taken by Serve once, and by nobody else."""
    serving = (details.get("http_options") or {}).get("port")
    if (details["applications"] or details["proxies"]) and serving is not None:
        if serving != config.port:
            raise ServeError(
                f"Ray Serve listens on port {serving} already.",
                value=config.port,
                rule="one port per cluster, chosen when Serve starts",
                options=[f"--port {serving}"],
                mend="darkroom serve --down, then serve again",
            )
        return
    if urlsplit(dashboard_url).hostname not in LOOPBACK:
        return
    try:
        socket.create_server((config.host, config.port), reuse_port=False).close()
    except OSError as error:
        raise ServeError(
            f"Port {config.port} cannot be used.",
            value=f"{config.host}:{config.port}",
            rule=f"a free port of this machine ({os.strerror(error.errno or 0)})",
            mend="stop what listens there, or choose another with --port",
        ) from error


def failure(application: dict[str, Any]) -> str | None:
    """The words of the typed error that stopped a replica, out of the traceback that Serve reports."""
    messages = [deployment.get("message") or "" for deployment in application.get("deployments", {}).values()]
    for message in [*messages, application.get("message") or ""]:
        found = list(_TYPED_ERROR.finditer(message))
        if found:
            return message[found[-1].end() :].strip()
    return None


def replica_states(application: dict[str, Any]) -> list[str]:
    """``STARTING``, ``RUNNING``, ..., one per replica."""
    deployments = application.get("deployments", {}).values()
    return [replica["state"] for deployment in deployments for replica in deployment["replicas"]]


def api_url(dashboard_url: str, config: ServeConfig) -> str:
    """Where this machine reaches the proxy: a wildcard listens on the dashboard's host too."""
    host = urlsplit(dashboard_url).hostname if config.host in {"0.0.0.0", "::"} else config.host  # noqa: S104
    return f"http://{host}:{config.port}"


def await_answer(url: str, config: ServeConfig, deadline: float) -> None:
    """Until the proxy knows the route and the replica behind it runs what was asked for."""
    import httpx

    last = "no answer"
    while time.monotonic() < deadline:
        try:
            answer = httpx.get(f"{url}/readyz", timeout=10)
        except httpx.TransportError as error:
            last = str(error)
        else:
            last = f"{answer.status_code} {answer.text[:200]}"
            if answer.status_code == 200 and config.model.endswith(answer.json()["model"]):
                return
        time.sleep(POLL_S)
    raise ServeError(
        "The deployment runs but does not answer.",
        value=f"{url}/readyz",
        rule=f"ready within {config.deploy_timeout_s:.0f} s; last: {last}",
        mend="a port that another program holds, or a host that this machine cannot reach: see Ray's dashboard",
    )
