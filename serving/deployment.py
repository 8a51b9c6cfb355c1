"""Ray Serve: what one replica is, and how a deployment is declared, awaited and taken down."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ray import serve
from ray.exceptions import RayError

from serving.config import ServeConfig
from serving.errors import ServeError
from serving.model import load_model, pinned
from serving.proxy import CALLBACK
from serving.rollout import (
    APPLICATION,
    POLL_S,
    api_url,
    await_answer,
    check_listener,
    drain_s,
    others,
    proxy_location,
    refuse_failed,
    replica_states,
)

if TYPE_CHECKING:
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
    from starlette.types import ASGIApp

_CONTROL_REQUESTS = 16
_TAKE_BACK_S = 30.0

Progress = Callable[[str], None]
"""Told, in a few words, whenever the deployment gets further."""


class ImageServer:
    """One replica: it loads the model, then answers requests with its own engine.

    Args:
        settings: a dumped ``ServeConfig`` whose model is pinned.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        from serving.engine import Engine

        self.config = ServeConfig.model_validate(settings)
        torch.set_num_threads(self.config.replica_threads)
        self.model = load_model(self.config)
        self.engine = Engine(
            self.model.denoiser,
            self.model.encoder,
            canvas=self.model.canvas,
            config=self.config.batch,
            grid=self.model.grid,
            device=self.model.device,
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Serve hands HTTP requests to, once the constructor is through."""
        from serving.app import create_app

        return create_app(self.engine, self.model.card, self.config.limits, behind_proxy=True)

    async def check_health(self) -> None:
        """Called by Serve; raises where the replica should be replaced."""
        if not self.engine.ready:
            rule = "a replica denoises until it is told to stop; its log says what failed"
            raise ServeError("The engine does not work any more.", rule=rule)


def build(args: dict[str, Any]) -> serve.Application:
    """The application that Serve imports and runs.

    Args:
        args: a dumped ``ServeConfig``.
    """
    config = ServeConfig.model_validate(args)
    in_flight = config.batch.max_waiting_images + config.batch.max_batch_rows + _CONTROL_REQUESTS
    deploys = serve.deployment(
        name="ImageServer",
        ray_actor_options={"num_cpus": config.replica_cpus, "num_gpus": config.replica_gpus},
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests,
        },
        # above what the engine accepts: its own refusal, in the dialect's envelope, is then what clients see
        max_ongoing_requests=in_flight,
        max_surge_percent=100,
        max_constructor_retry_count=2,
        health_check_period_s=config.health_check_period_s,
        graceful_shutdown_timeout_s=config.graceful_shutdown_timeout_s,
    )
    replica: serve.Deployment = deploys(serve.ingress()(ImageServer))
    application: serve.Application = replica.bind(config.model_dump(mode="json"))
    return application


@dataclass(frozen=True)
class Endpoint:
    """Where a deployment answers.

    Attributes:
        url: the API's base, e.g. ``http://127.0.0.1:8000``.
        model: what it serves, ``name/version`` or a bundle's directory.
        seconds: how long it took until the first request was answered.
    """

    url: str
    model: str
    seconds: float


def deploy(dashboard_url: str, config: ServeConfig, progress: Progress) -> Endpoint:
    """Declare the deployment and wait until it answers; a running one is replaced without an outage.

    Args:
        dashboard_url: Ray's dashboard, e.g. ``http://127.0.0.1:8265``.
        config: what to serve; an alias is resolved to its version first.
        progress: told about each stage.

    Raises:
        ServeError: unreachable cluster, port in use, or a replica that does not start, with its own words.
        RegistryError, TrackingError: no such model, or no registry.
    """
    started = time.monotonic()
    config = pinned(config)
    url = api_url(dashboard_url, config)
    deadline = started + config.deploy_timeout_s
    with _client(dashboard_url) as client:
        details = client.get_serve_details()
        check_listener(details, dashboard_url, config)
        progress(f"deploying {config.model}")
        try:
            _declare(client, details, config)
            _await_running(client, config, deadline, progress)
            await_answer(url, config, deadline, lambda: refuse_failed(_application(client), config.model))
        except (ServeError, KeyboardInterrupt):
            progress("taking it back")
            _take_back(client, details)
            raise
    return Endpoint(url, config.model, time.monotonic() - started)


def undeploy(dashboard_url: str, timeout_s: float = 60) -> bool:
    """Take the application down; Serve itself too, and its port, where nobody else uses it.

    Args:
        dashboard_url: Ray's dashboard.
        timeout_s: how long it may take beyond what its replicas have to finish their requests.

    Returns:
        Whether there was anything to take down.

    Raises:
        ServeError: unreachable cluster, or it does not stop in time.
    """
    with _client(dashboard_url) as client:
        ours = _application(client)
        if not ours:
            return False
        timeout_s += drain_s(ours)
        deadline = time.monotonic() + timeout_s
        _remove(client)
        while _application(client):
            if time.monotonic() > deadline:
                rule = f"stopped within {timeout_s:.0f} s"
                raise ServeError("The application does not stop.", rule=rule, mend="darkroom down")
            time.sleep(POLL_S)
        return True


def _declare(client: ServeSubmissionClient, details: dict[str, Any], config: ServeConfig) -> None:
    """Tell Serve what should run: everybody else's applications as they are, and ours."""
    client.deploy_applications(
        {
            "proxy_location": proxy_location(config),
            "http_options": {"host": config.host, "port": config.port},
            # read only where this starts Serve
            "controller_options": {"runtime_env": {"env_vars": CALLBACK}},
            "applications": [*others(details), _declaration(config)],
        }
    )


def _redeclare(client: ServeSubmissionClient, ours: list[dict[str, Any]]) -> None:
    """Tell the Serve that runs to keep everybody else's applications and, of ours, only these.

    Applications that a script started are not listed: Serve keeps them, whatever is declared.
    """
    details = client.get_serve_details()
    http = {key: details["http_options"][key] for key in ("host", "port")}
    applications = [*others(details), *ours]
    client.deploy_applications(
        {"proxy_location": details["proxy_location"], "http_options": http, "applications": applications}
    )


def _remove(client: ServeSubmissionClient) -> None:
    """Our application leaves; Serve too, but only where nothing else runs in it."""
    if set(client.get_serve_details()["applications"]) <= {APPLICATION}:
        cast("Any", client).delete_applications()
    else:
        _redeclare(client, [])


def _take_back(client: ServeSubmissionClient, before: dict[str, Any]) -> None:
    """Leave the cluster as it was before a deployment that failed; its replicas never stopped answering."""
    ours = before["applications"].get(APPLICATION, {})
    if ours.get("status") != "RUNNING" and "RUNNING" not in replica_states(ours):
        _remove(client)
        return
    _redeclare(client, [ours["deployed_app_config"]])
    deadline = time.monotonic() + _TAKE_BACK_S
    while time.monotonic() < deadline and _application(client).get("status") != "RUNNING":
        time.sleep(POLL_S)


def _application(client: ServeSubmissionClient) -> dict[str, Any]:
    """What Serve says of ours; empty where it knows none."""
    found: dict[str, Any] = client.get_serve_details()["applications"].get(APPLICATION, {})
    return found


@contextmanager
def _client(dashboard_url: str) -> Iterator[ServeSubmissionClient]:
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


def _declaration(config: ServeConfig) -> dict[str, Any]:
    kept = {name: os.environ[name] for name in ("HF_HUB_OFFLINE",) if name in os.environ}
    return {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": f"{__name__}:build",
        "args": config.model_dump(mode="json"),
        "runtime_env": {"env_vars": kept} if kept else {},
    }


def _await_running(client: ServeSubmissionClient, config: ServeConfig, deadline: float, progress: Progress) -> None:
    """Follow the application until Serve calls it running."""
    said = ""
    while True:
        application = _application(client)
        status = application.get("status", "NOT_STARTED")
        refuse_failed(application, config.model)
        if status == "RUNNING":
            return
        if time.monotonic() > deadline:
            raise ServeError(
                "The deployment does not come up.",
                value=f"{status}; replicas: {', '.join(replica_states(application)) or 'none'}",
                rule=f"running within {config.deploy_timeout_s:.0f} s on {config.replica_cpus} CPUs per replica",
                mend="free resources of the cluster, or ask for less with --replica-cpus; darkroom status shows them",
            )
        if status != said:
            progress(status.lower().replace("_", " "))
            said = status
        time.sleep(POLL_S)
