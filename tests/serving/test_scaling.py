"""How many replicas a deployment asks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig

from serving.scaling import METRIC, ByWork


def wanted(running: int, requests: float, work_s: list[float]) -> int:
    """What Serve's own controller makes of the policy."""
    config = AutoscalingConfig(
        min_replicas=0, max_replicas=8, target_ongoing_requests=4, upscale_delay_s=0, downscale_delay_s=0
    )
    context: Any = SimpleNamespace(
        current_num_replicas=running,
        target_num_replicas=running,
        total_num_requests=requests,
        aggregated_metrics={METRIC: dict(enumerate(work_s))} if work_s else {},
        config=config,
        policy_state={},
    )
    count, _ = _apply_autoscaling_config(ByWork(target_work_s=30))(context)
    return int(count)


@pytest.mark.parametrize(
    ("running", "requests", "work_s", "replicas"),
    [
        (1, 4, [30.0], 1),
        (1, 1, [90.0], 3),  # one request, and much in it
        (2, 2, [100.0, 20.0], 4),
        (1, 12, [1.0], 3),  # many, and little in each
        (4, 4, [5.0, 5.0, 5.0, 5.0], 1),
        (1, 8, [], 2),  # nothing reported yet
        (1, 0, [0.0], 0),
        (0, 1, [], 1),
        (0, 0, [], 0),
    ],
)
def test_replicas_follow_requests_and_their_work(
    running: int, requests: float, work_s: list[float], replicas: int
) -> None:
    assert wanted(running, requests, work_s) == replicas
