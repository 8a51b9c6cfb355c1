"""A model beside the main one: an application of its own at the same address, which a request's ``model`` chooses."""

from __future__ import annotations

import time

from serving import beside, candidate, deployment_client
from serving.config import ServeConfig
from serving.deployment import Endpoint
from serving.deployment_client import Progress
from serving.errors import ServeError
from serving.model import pinned
from serving.rollout import APPLICATION, api_url, await_answer, check_listener, refuse_failed


def deploy_beside(dashboard_url: str, config: ServeConfig, progress: Progress) -> Endpoint:
    """Serve one more model; where it runs already, it is replaced without an outage.

    Args:
        dashboard_url: Ray's dashboard.
        config: what to serve. Clients choose it by its name.
        progress: told about each stage.

    Raises:
        ServeError: no main model serves here, a name that cannot be part of a route, or it does not start.
        RegistryError, TrackingError: no such model, or no registry.
    """
    started = time.monotonic()
    config = pinned(config)
    called = config.pinned.name if config.pinned else ""
    if not beside.NAME.fullmatch(called):
        raise ServeError(
            "A model of this name cannot be served beside another.", value=called, rule="letters, digits, and _ . -"
        )
    name, route = f"{beside.APPLICATION}{called}", f"{beside.PATH}/{called}"
    url, deadline = api_url(dashboard_url, config), started + config.deploy_timeout_s
    with deployment_client.connected(dashboard_url) as client:
        details = client.get_serve_details()
        check_listener(details, dashboard_url, config)
        main = deployment_client.declared(details, APPLICATION, candidate.APPLICATION)
        if not main:
            rule = "a main model, which requests get that name none"
            raise ServeError("There is no endpoint.", value=url, rule=rule, mend="darkroom serve MODEL, first")
        if (main[0]["args"].get("pinned") or {}).get("name") == called:
            rule = "another name than the main model's: requests choose by it"
            raise ServeError(
                "This is the main model.", value=called, rule=rule, mend="darkroom serve, without --beside"
            )
        progress(f"deploying {config.model} beside it")
        before = details["applications"].pop(name, None)
        try:
            ours = [*main, deployment_client.declaration(config, name, route)]
            deployment_client.declare(client, details, config, ours)
            deployment_client.await_running(client, config, deadline, progress, name)
            application = deployment_client.application
            await_answer(
                f"{url}{route}", config, deadline, lambda: refuse_failed(application(client, name), config.model)
            )
        except (ServeError, KeyboardInterrupt):
            progress("taking it back")
            again = [before["deployed_app_config"]] if before and before["deployed_app_config"] else []
            deployment_client.redeclare(client, [*main, *again], without=lambda other: other == name)
            raise
    return Endpoint(url, config.model, time.monotonic() - started)


def withdraw_beside(dashboard_url: str, called: str) -> bool:
    """Take one such model down; requests that it works on are finished.

    Args:
        dashboard_url: Ray's dashboard.
        called: its name.

    Returns:
        Whether it was there.

    Raises:
        ServeError: unreachable cluster.
    """
    name = f"{beside.APPLICATION}{called}"
    with deployment_client.connected(dashboard_url) as client:
        details = client.get_serve_details()
        if name not in details["applications"]:
            return False
        main = deployment_client.declared(details, APPLICATION, candidate.APPLICATION)
        deployment_client.redeclare(client, main, without=lambda other: other == name)
        return True
