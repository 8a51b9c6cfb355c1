"""What Serve's status says, and whether an endpoint can be had and answers; plain data and HTTP, no Ray."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from serving import beside, candidate
from serving.config import PinnedModel, ServeConfig
from serving.errors import ServeError
from serving.readiness import Readiness

APPLICATION = "darkroom"
"""The name of our application in Serve; others on the same cluster are left alone."""
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
"""Hosts that only this machine reaches; a proxy that the environment names cannot."""
_TWO = frozenset({APPLICATION, candidate.APPLICATION})
POLL_S = 0.25
"""Seconds between two looks."""
_FAILED = frozenset({"DEPLOY_FAILED", "UNHEALTHY"})
_TYPED_ERROR = re.compile(r"^(?:ray\.\S+: )?(?:\w+\.)+\w*Error: ", re.MULTILINE)


def is_ours(name: str) -> bool:
    """Whether an application is ours: the main one, a candidate for its place, or a model beside it."""
    return name in _TWO or name.startswith(beside.APPLICATION)


def others(details: dict[str, Any]) -> list[dict[str, Any]]:
    """All applications but the main one and its candidate: declaring those without the rest would remove the rest."""
    applications = details["applications"].items()
    return [app["deployed_app_config"] for name, app in applications if name not in _TWO and app["deployed_app_config"]]


def proxy_location(config: ServeConfig) -> str:
    """On which nodes Serve's proxies listen."""
    return "HeadOnly" if config.host in LOOPBACK else "EveryNode"


def check_listener(details: dict[str, Any], dashboard_url: str, config: ServeConfig) -> None:
    """Serve keeps the place where it listens; a port is taken by it once, and by nobody else."""
    http = details.get("http_options")
    if http and (details["applications"] or details["proxies"]):
        listens, location = f"{http['host']}:{http['port']}", details["proxy_location"]
        # proxies on every node are on the head too
        if listens != f"{config.host}:{config.port}" or location not in {proxy_location(config), "EveryNode"}:
            raise ServeError(
                f"Ray Serve listens on {listens} already ({location}).",
                value=f"{config.host}:{config.port} ({proxy_location(config)})",
                rule="one address per cluster, chosen when Serve starts",
                options=[f"--host {http['host']} --port {http['port']}"],
                mend="darkroom serve --down, then serve again; applications of others keep Serve where it is",
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


def refuse_failed(application: dict[str, Any], model: str) -> None:
    """Stop waiting for what cannot come.

    Raises:
        ServeError: Serve gave the application up, or a replica of it did not start; its own words.
    """
    status = application.get("status", "NOT_STARTED")
    words = failure(application)
    if status in _FAILED or (words and status != "RUNNING"):
        raise ServeError(f"{model} could not be deployed. {words or application.get('message') or status}")


def replica_states(application: dict[str, Any]) -> list[str]:
    """``STARTING``, ``RUNNING``, ..., one per replica."""
    deployments = application.get("deployments", {}).values()
    return [replica["state"] for deployment in deployments for replica in deployment["replicas"]]


def api_url(dashboard_url: str, config: ServeConfig) -> str:
    """Where this machine reaches the proxy: a wildcard listens on the dashboard's host too."""
    host = urlsplit(dashboard_url).hostname if config.host in {"0.0.0.0", "::"} else config.host  # noqa: S104
    return f"http://{host}:{config.port}"


def drain_s(application: dict[str, Any]) -> float:
    """Seconds that its replicas may take to finish their requests once they are told to stop."""
    deployments = application.get("deployments", {}).values()
    return max((each["deployment_config"].get("graceful_shutdown_timeout_s") or 0 for each in deployments), default=0)


def await_answer(url: str, config: ServeConfig, deadline: float, check: Callable[[], None]) -> None:
    """Until the proxy knows the route and the replica behind it runs the very weights that were asked for.

    Args:
        url: the API's base.
        config: what was deployed, pinned.
        deadline: on ``time.monotonic``'s clock.
        check: called between two looks; raises where waiting is in vain.

    Raises:
        ServeError: the deadline passed; with the last thing that was heard.
    """
    import httpx

    last = "no answer"
    trust_env = urlsplit(url).hostname not in LOOPBACK
    while time.monotonic() < deadline:
        try:
            answer = httpx.get(f"{url}/readyz", timeout=10, trust_env=trust_env)
        except httpx.RequestError as error:
            last = str(error)
        else:
            last = f"{answer.status_code} {answer.text[:200]}"
            if answer.status_code == 200 and _runs(answer.content, config.pinned):
                return
        check()
        time.sleep(POLL_S)
    raise ServeError(
        "The deployment runs but does not answer.",
        value=f"{url}/readyz",
        rule=f"ready within {config.deploy_timeout_s:.0f} s; last: {last}",
        mend="a port that another program holds, or a host that this machine cannot reach: see Ray's dashboard",
    )


def _runs(body: bytes, wanted: PinnedModel | None) -> bool:
    """Whether this is a replica's word, and it runs those weights under that name."""
    try:
        said = Readiness.model_validate_json(body)
    except ValidationError:
        return False
    return wanted is not None and (said.model, said.bundle_sha256) == (wanted.label, wanted.sha256)
