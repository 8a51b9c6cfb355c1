"""A deployment follows what its model's name points at."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from cluster.rollouts import trial_of
from serving.config import ServeConfig
from serving.deployment_follow import follow
from serving.errors import ServeError
from serving.model import pinned
from training.bundle import MANIFEST
from training.errors import UsageError


def test_what_the_name_points_at_is_rolled_out_once(tmp_path: Path) -> None:
    manifest = tmp_path / MANIFEST
    manifest.write_text("1")
    config = ServeConfig(model=str(tmp_path))
    said: list[str] = []
    rolled: list[ServeConfig] = []
    steps = iter(["2", "2", "gone", "3", "3", "3"])

    class Clock(threading.Event):
        """Time stands still between two looks; the world changes meanwhile."""

        def wait(self, timeout: float | None = None) -> bool:
            assert timeout == 5
            step = next(steps, None)
            if step is None:
                return True
            if step == "gone":
                manifest.unlink()
            else:
                manifest.write_text(step)
            return False

    def roll_out(latest: ServeConfig) -> None:
        rolled.append(latest)
        if len(rolled) == 2:
            raise ServeError("It was rolled back.")

    current = pinned(config)
    follow(config, current, 5, roll_out, said.append, Clock())
    assert [each.pinned != current.pinned for each in rolled] == [True, True]
    assert rolled[1] == pinned(config)
    assert [line.partition(":")[0] for line in said] == [
        f"{tmp_path} is {tmp_path} now",
        f"cannot tell what {tmp_path} is",
        f"{tmp_path} is {tmp_path} now",
        "It was rolled back.",
    ]


def test_a_model_is_tried_one_way() -> None:
    assert trial_of(None, None, min_requests=3) is None
    assert trial_of(0.0, None, min_requests=3) == {"kind": "canary", "percent": 0.0, "min_requests": 3}
    assert trial_of(None, 5, min_requests=3) == {"kind": "shadow", "percent": 5, "min_requests": 3}
    with pytest.raises(UsageError, match="one way at a time"):
        trial_of(1, 1)
