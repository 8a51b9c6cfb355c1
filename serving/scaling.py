"""How many replicas: as many as the requests in flight ask for, or the work that they mean, whichever is more.

Serve's controller runs this; it is pickled by value there, so it imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Protocol

METRIC = "work_s"
"""What a replica reports: seconds of its device that the images need which it has accepted."""


class Targets(Protocol):
    """Serve's configuration of a deployment's scaling."""

    def get_target_ongoing_requests(self) -> float:
        """Requests in flight per replica."""
        ...


class Context(Protocol):
    """What Serve tells a policy."""

    current_num_replicas: int
    target_num_replicas: int
    total_num_requests: float
    aggregated_metrics: Mapping[str, Mapping[Hashable, float]] | None
    config: Targets


class ByWork:
    """A policy for Serve: one request for eight pictures of a hundred steps weighs more than one for one of four.

    Args:
        target_work_s: seconds of work per replica.
    """

    def __init__(self, target_work_s: float) -> None:
        self.target_work_s = target_work_s

    def __call__(self, context: Context) -> tuple[float, dict[str, Any]]:
        """The number of replicas that is wanted, and no state. Serve bounds it and waits for it to last."""
        if context.current_num_replicas == 0:
            return context.target_num_replicas, {}
        reported = (context.aggregated_metrics or {}).get(METRIC, {})
        by_work = sum(reported.values()) / self.target_work_s
        by_requests = context.total_num_requests / context.config.get_target_ongoing_requests()
        return max(by_work, by_requests), {}
