"""How a model comes to serve: at once, or tried first; once, or whenever an alias moves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from cluster.console import say
from training.errors import UsageError

if TYPE_CHECKING:
    from cluster.stack import Stack
    from serving.config import ServeConfig
    from serving.deployment import Endpoint


def trial_of(canary: float | None, shadow: float | None, **judged: float) -> dict[str, object] | None:
    """What the options say of a trial; None where the model shall serve at once.

    Args:
        canary: percentage of the requests that it answers.
        shadow: percentage of the requests of which it gets copies.
        judged: when it is rolled back.

    Raises:
        UsageError: both.
    """
    if canary is not None and shadow is not None:
        raise UsageError("A model is tried one way at a time.", options=["--canary", "--shadow"])
    if canary is not None:
        return {"kind": "canary", "percent": canary, **judged}
    return None if shadow is None else {"kind": "shadow", "percent": shadow, **judged}


def way(
    stack: Stack, trial: dict[str, object] | None, bake_s: float, *, beside: bool
) -> Callable[[ServeConfig], Endpoint]:
    """What puts a model in the place of what serves, or beside it.

    Args:
        stack: where.
        trial: as ``trial_of`` says.
        bake_s: seconds for which a trial is watched.
        beside: requests that name it get it; the others, what serves already.

    Raises:
        UsageError: a trial of what is served beside.
    """
    if beside:
        if trial is not None:
            raise UsageError("Only the main model's place is tried for.", options=["--beside", "--canary or --shadow"])
        from serving.deployment_models import deploy_beside

        return partial(deploy_beside, stack.dashboard_url, progress=say)
    if trial is None:
        from serving.deployment import deploy

        return partial(deploy, stack.dashboard_url, progress=say)
    return partial(_tried, stack, trial, bake_s)


def _tried(stack: Stack, trial: dict[str, Any], bake_s: float, config: ServeConfig) -> Endpoint:
    from serving.deployment_candidate import pinned_trial, roll_out

    config, candidate = pinned_trial(config, trial)
    return roll_out(stack.dashboard_url, config, candidate, bake_s, say)


def follow(config: ServeConfig, current: ServeConfig, every_s: float, roll_out: Callable[[ServeConfig], Any]) -> None:
    """Until Ctrl-C, whatever the alias points at is rolled out; then the endpoint stays as it is."""
    from serving import deployment_follow

    say(f"following {config.model}; Ctrl-C ends that and leaves the endpoint up")
    try:
        deployment_follow.follow(config, current, every_s, roll_out, say, threading.Event())
    except KeyboardInterrupt:
        say("not following any more")
