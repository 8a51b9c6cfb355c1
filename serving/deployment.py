"""Ray Serve: what one replica is, and how a deployment is declared, awaited and taken down."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray import serve

from serving import candidate, scaling
from serving.config import ServeConfig
from serving.deployment_client import (
    Progress,
    application,
    await_running,
    connected,
    declaration,
    declare,
    declared,
    remove,
    take_back,
)
from serving.errors import ServeError
from serving.model import load_model, pinned
from serving.rollout import POLL_S, api_url, await_answer, check_listener, drain_s, is_ours, refuse_failed
from serving.safety_checks import load_safety

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_CONTROL_REQUESTS = 16


class ImageServer:
    """One replica: it loads the model, then answers requests with its own engine.

    Args:
        settings: a dumped ``ServeConfig`` whose model is pinned.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        from serving import logs
        from serving.deployment_metrics import ray_sink
        from serving.telemetry import Telemetry

        self.config = ServeConfig.model_validate(settings)
        torch.set_num_threads(self.config.replica_threads)
        self.model = load_model(self.config)
        self.safety = load_safety(self.config.safety)
        logs.configure(self.config.telemetry, model=self.model.card.names[-1])
        self.telemetry = Telemetry.of(self.model.card, self.config.telemetry, ray_sink)
        self.engine = self.model.engine(self.config, self.telemetry.observer)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Serve hands HTTP requests to, once the constructor is through."""
        from serving.app import create_app
        from serving.behind_proxy import BehindProxy

        app = create_app(
            self.engine,
            self.model.card,
            self.config.limits,
            behind_proxy=True,
            telemetry=self.telemetry,
            provenance=self.config.provenance,
            safety=self.safety,
            audit=self.config.audit,
            admission=self.config.admission,
            jobs=self.config.jobs,
        )
        return BehindProxy(app)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, for ``ByWork``."""
        return {scaling.METRIC: self.engine.backlog_s}

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
            "downscale_to_zero_delay_s": config.idle_s,
            "policy": {
                "policy_function": f"{scaling.__name__}:{scaling.ByWork.__name__}",
                "policy_kwargs": {"target_work_s": config.target_work_s},
            },
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
    with connected(dashboard_url) as client:
        details = client.get_serve_details()
        check_listener(details, dashboard_url, config)
        progress(f"deploying {config.model}")
        try:
            declare(client, details, config, [declaration(config), *declared(details, candidate.APPLICATION)])
            await_running(client, config, deadline, progress)
            await_answer(url, config, deadline, lambda: refuse_failed(application(client), config.model))
        except (ServeError, KeyboardInterrupt):
            progress("taking it back")
            take_back(client, details)
            raise
    return Endpoint(url, config.model, time.monotonic() - started)


def undeploy(dashboard_url: str, timeout_s: float = 60) -> bool:
    """Take our applications down; Serve itself too, and its port, where nobody else uses it.

    Args:
        dashboard_url: Ray's dashboard.
        timeout_s: how long it may take beyond what its replicas have to finish their requests.

    Returns:
        Whether there was anything to take down.

    Raises:
        ServeError: unreachable cluster, or it does not stop in time.
    """
    with connected(dashboard_url) as client:
        ours = _ours(client.get_serve_details())
        if not ours:
            return False
        timeout_s += max(map(drain_s, ours))
        deadline = time.monotonic() + timeout_s
        remove(client)
        while _ours(client.get_serve_details()):
            if time.monotonic() > deadline:
                rule = f"stopped within {timeout_s:.0f} s"
                raise ServeError("The application does not stop.", rule=rule, mend="darkroom down")
            time.sleep(POLL_S)
        return True


def _ours(details: dict[str, Any]) -> list[dict[str, Any]]:
    """What Serve says of our applications: all of them."""
    return [found for name, found in details["applications"].items() if is_ours(name)]
