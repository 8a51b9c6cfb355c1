"""A candidate in Serve: tried beside the model that serves, then promoted into its place or withdrawn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
from pydantic import TypeAdapter, ValidationError

from serving import candidate, deployment_client
from serving.candidate import CandidateConfig, Measured
from serving.config import ServeConfig
from serving.deployment import Endpoint, deploy
from serving.deployment_client import Progress
from serving.errors import ServeError
from serving.model import pinned
from serving.rollout import APPLICATION, LOOPBACK, POLL_S, api_url, await_answer, check_listener, refuse_failed

_MEASURED = TypeAdapter(list[Measured])

Judge = Callable[[str], str | None]
"""Told the base URL at which only the candidate answers; says what is wrong with its pictures, or None."""


def roll_out(
    dashboard_url: str,
    config: ServeConfig,
    trial: CandidateConfig,
    bake_s: float,
    progress: Progress,
    judge: Judge | None = None,
) -> Endpoint:
    """Try a candidate on real traffic; if it does well it takes the place of what serves, else it is withdrawn.

    No client sees it fail: what a canary cannot answer, the model that serves does. A shadow is only measured, and
    withdrawn at the end.

    Args:
        dashboard_url: Ray's dashboard.
        config: what to serve, pinned.
        trial: its share, and what it may not do.
        bake_s: seconds for which it is watched.
        progress: told about each stage.
        judge: asked once it answers, before clients are.

    Returns:
        The endpoint: with the candidate, or as it was after a shadow.

    Raises:
        ServeError: it was withdrawn: it did not start, failed too often, was asked too little, or was judged.
    """
    started = time.monotonic()
    url = api_url(dashboard_url, config)
    with _withdrawn(dashboard_url, progress):
        try_out(dashboard_url, config, trial, progress, judge)
        progress(f"watching it for {bake_s:.0f} s")
        measured = watch(url, trial, bake_s)
        _require_fit(measured, trial, config.model)
        progress(f"{measured.requests} requests, {measured.errors} errors, {measured.mean_s:.2f} s on average")
        if trial.kind == "canary":
            return deploy(dashboard_url, config, progress)
    return Endpoint(url, config.model, time.monotonic() - started)


def try_out(
    dashboard_url: str, config: ServeConfig, trial: CandidateConfig, progress: Progress, judge: Judge | None = None
) -> None:
    """Start a candidate beside the model that serves; it gets its share once it answers. It stays until withdrawn.

    Raises:
        ServeError: nothing serves here, or the candidate does not start, or was judged.
    """
    deadline = time.monotonic() + config.deploy_timeout_s
    url = api_url(dashboard_url, config)
    aside = f"{candidate.PATH}/{trial.sha256}"
    with deployment_client.connected(dashboard_url) as client:
        details = client.get_serve_details()
        check_listener(details, dashboard_url, config)
        serving = deployment_client.declared(details, APPLICATION)
        if details["applications"].get(APPLICATION, {}).get("status") != "RUNNING":
            rule = "a model that serves, with which a candidate is compared"
            raise ServeError("There is no endpoint.", value=url, rule=rule, mend="darkroom serve MODEL, first")
        progress(f"deploying {config.model} as a candidate")

        def told(route: str) -> None:
            ours = [*serving, deployment_client.declaration(config, candidate.APPLICATION, route)]
            deployment_client.declare(client, details, config, ours)
            deployment_client.await_running(client, config, deadline, progress, candidate.APPLICATION)
            check = deployment_client.application
            await_answer(
                f"{url}{route}",
                config,
                deadline,
                lambda: refuse_failed(check(client, candidate.APPLICATION), config.model),
            )

        told(aside)  # where no proxy looks: nobody waits for a replica that starts
        if judge is not None and (reason := judge(f"{url}{aside}")):
            raise ServeError(f"{config.model} is not fit to serve. {reason}")
        told(trial.route)


def watch(url: str, trial: CandidateConfig, bake_s: float) -> Measured:
    """What the proxy at ``url`` measures of the candidate, at the end of ``bake_s`` seconds or once it is stopped.

    Raises:
        ServeError: the proxy does not answer, or knows of no such candidate.
    """
    ends = time.monotonic() + bake_s
    while True:
        measured = measure(url, trial)
        if measured.stopped or time.monotonic() >= ends:
            return measured
        time.sleep(POLL_S)


def measure(url: str, trial: CandidateConfig) -> Measured:
    """What the proxy at ``url`` has measured of the candidate until now.

    Raises:
        ServeError: the proxy does not answer, or knows of no such candidate within ten seconds.
    """
    deadline = time.monotonic() + 10
    said = ""
    while time.monotonic() < deadline:
        try:
            answer = httpx.get(f"{url}{candidate.PATH}", timeout=10, trust_env=httpx.URL(url).host not in LOOPBACK)
            said = answer.text[:200]
            found = _MEASURED.validate_json(answer.content)
        except (httpx.RequestError, ValidationError) as error:
            said = said or str(error)
            found = []
        for each in found:
            if each.route == trial.route:
                return each
        time.sleep(POLL_S)
    rule = "what Darkroom's proxy has measured of the candidate; a Serve that others started has another proxy"
    raise ServeError("The proxy does not tell of the candidate.", value=said, rule=rule)


def withdraw(dashboard_url: str) -> bool:
    """End a candidate; requests that it works on are finished.

    Returns:
        Whether there was one.

    Raises:
        ServeError: unreachable cluster.
    """
    with deployment_client.connected(dashboard_url) as client:
        details = client.get_serve_details()
        if candidate.APPLICATION not in details["applications"]:
            return False
        deployment_client.redeclare(client, deployment_client.declared(details, APPLICATION))
        return True


@contextmanager
def _withdrawn(dashboard_url: str, progress: Progress) -> Iterator[None]:
    """At the end, however it comes, there is no candidate."""
    try:
        yield
    finally:
        progress("withdrawing the candidate")
        withdraw(dashboard_url)


def _require_fit(measured: Measured, trial: CandidateConfig, model: str) -> None:
    seen = f"{measured.requests} requests, {measured.errors} of them failed"
    if measured.stopped:
        rule = f"at most {trial.max_error_rate:.0%} of them fail"
        raise ServeError(f"{model} was rolled back.", value=seen, rule=rule, mend="see the log of its replicas")
    if measured.requests < trial.min_requests:
        rule = f"{trial.min_requests} requests, to judge it by"
        raise ServeError(
            f"{model} was rolled back.", value=seen, rule=rule, mend="--bake longer, or --min-requests fewer"
        )


def pinned_trial(config: ServeConfig, trial: dict[str, object]) -> tuple[ServeConfig, CandidateConfig]:
    """The config with its weights fixed, and the candidate that they are.

    Args:
        config: what to serve.
        trial: the fields of ``CandidateConfig`` but its checksum.

    Raises:
        DarkroomError: no such model.
    """
    config = pinned(config)
    sha256 = config.pinned.sha256[:12] if config.pinned else ""
    return config, CandidateConfig.model_validate({"sha256": sha256, **trial})
