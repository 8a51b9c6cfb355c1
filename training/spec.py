"""What one training process is told, and how it answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Emit = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class WorkerSpec:
    """What one training process is told.

    Attributes:
        config: the recipe.
        run_dir: the run's folder, the same on every rank.
        rank: number of this process, 0-based.
        local_rank: its number on this node.
        world: how many there are.
        address: host of rank 0.
        port: a free port there.
        tracking_uri: the MLflow server; empty tracks nothing.
        tags: go to the MLflow run.
        parent_run_id: the sweep's MLflow run.
    """

    config: Mapping[str, Any]
    run_dir: str
    rank: int
    local_rank: int
    world: int
    address: str
    port: int
    tracking_uri: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    parent_run_id: str | None = None


def mark(name: str) -> dict[str, Any]:
    """A moment of the start, for the account of where time goes."""
    return {"event": "mark", "name": name, "time_s": time.time()}
