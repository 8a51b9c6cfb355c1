"""What Ray Serve is told, and what it says, over its REST interface: our applications beside everybody else's."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from ray.exceptions import RayError

from serving import candidate
from serving.config import ServeConfig
from serving.errors import ServeError
from serving.proxy import CALLBACK
from serving.rollout import APPLICATION, POLL_S, is_ours, others, proxy_location, refuse_failed, replica_states

if TYPE_CHECKING:
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

IMPORT_PATH = "serving.deployment:build"
"""What makes an application out of a dumped ``ServeConfig``."""
_TAKE_BACK_S = 30.0

Progress = Callable[[str], None]
"""Told, in a few words, whenever a deployment gets further."""


@contextmanager
def connected(dashboard_url: str) -> Iterator[ServeSubmissionClient]:
    """Serve's REST client; whatever it meets on the way becomes one typed error."""
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    try:
        yield ServeSubmissionClient(dashboard_url)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ServeError(
            "Ray's dashboard cannot be used.",
            value=dashboard_url,
            rule=next(iter(str(error).splitlines()), type(error).__name__),
            mend="darkroom up, or give --address of a cluster that runs",
        ) from error


def application(client: ServeSubmissionClient, name: str = APPLICATION) -> dict[str, Any]:
    """What Serve says of one of ours; empty where it knows none."""
    found: dict[str, Any] = client.get_serve_details()["applications"].get(name, {})
    return found


def declaration(config: ServeConfig, name: str = APPLICATION, route: str = "/") -> dict[str, Any]:
    """One of our applications, as Serve is told of it."""
    kept = {name: os.environ[name] for name in ("HF_HUB_OFFLINE",) if name in os.environ}
    return {
        "name": name,
        "route_prefix": route,
        "import_path": IMPORT_PATH,
        "args": config.model_dump(mode="json"),
        "runtime_env": {"env_vars": kept} if kept else {},
    }


def declared(details: dict[str, Any], *names: str) -> list[dict[str, Any]]:
    """Those of our applications as Serve was told of them, where they are there."""
    found = (details["applications"].get(name) for name in names)
    return [each["deployed_app_config"] for each in found if each and each["deployed_app_config"]]


def declare(
    client: ServeSubmissionClient, details: dict[str, Any], config: ServeConfig, ours: list[dict[str, Any]]
) -> None:
    """Tell Serve what should run: everybody else's applications as they are, and ours. It is started if need be."""
    client.deploy_applications(
        {
            "proxy_location": proxy_location(config),
            "http_options": {"host": config.host, "port": config.port},
            # read only where this starts Serve
            "controller_options": {"runtime_env": {"env_vars": CALLBACK}},
            "applications": [*others(details), *ours],
        }
    )


def redeclare(
    client: ServeSubmissionClient, ours: list[dict[str, Any]], without: Callable[[str], bool] | None = None
) -> None:
    """Tell the Serve that runs to keep what else there is and, of the main application and its candidate, only these.

    Applications that a script started are not listed: Serve keeps them, whatever is declared.

    Args:
        client: Serve's.
        ours: as they were declared.
        without: by name, what else shall go.
    """
    details = client.get_serve_details()
    if without is not None:
        details["applications"] = {name: app for name, app in details["applications"].items() if not without(name)}
    http = {key: details["http_options"][key] for key in ("host", "port")}
    applications = [*others(details), *ours]
    client.deploy_applications(
        {"proxy_location": details["proxy_location"], "http_options": http, "applications": applications}
    )


def remove(client: ServeSubmissionClient) -> None:
    """Our applications leave; Serve too, but only where nothing else runs in it."""
    if all(map(is_ours, client.get_serve_details()["applications"])):
        cast("Any", client).delete_applications()
    else:
        redeclare(client, [], without=is_ours)


def take_back(client: ServeSubmissionClient, before: dict[str, Any]) -> None:
    """Leave the cluster as it was before a deployment that failed; its replicas never stopped answering."""
    ours = before["applications"].get(APPLICATION, {})
    if ours.get("status") != "RUNNING" and "RUNNING" not in replica_states(ours):
        remove(client)
        return
    redeclare(client, declared(before, APPLICATION, candidate.APPLICATION))
    deadline = time.monotonic() + _TAKE_BACK_S
    while time.monotonic() < deadline and application(client).get("status") != "RUNNING":
        time.sleep(POLL_S)


def await_running(
    client: ServeSubmissionClient, config: ServeConfig, deadline: float, progress: Progress, name: str = APPLICATION
) -> None:
    """Follow an application until Serve calls it running.

    Args:
        client: Serve's.
        config: what was deployed.
        deadline: on ``time.monotonic``'s clock.
        progress: told about each stage.
        name: which of ours.

    Raises:
        ServeError: it failed, in its own words, or the deadline passed.
    """
    said = ""
    while True:
        found = application(client, name)
        status = found.get("status", "NOT_STARTED")
        refuse_failed(found, config.model)
        if status == "RUNNING":
            return
        if time.monotonic() > deadline:
            raise ServeError(
                "The deployment does not come up.",
                value=f"{status}; replicas: {', '.join(replica_states(found)) or 'none'}",
                rule=f"running within {config.deploy_timeout_s:.0f} s on {config.replica_cpus} CPUs per replica",
                mend="free resources of the cluster, or ask for less with --replica-cpus; darkroom status shows them",
            )
        if status != said:
            progress(status.lower().replace("_", " "))
            said = status
        time.sleep(POLL_S)
