"""``darkroom doctor --deep``: the real engine's self-tests on the nodes of a cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.console import say

if TYPE_CHECKING:
    from training.self_tests.finding import Finding


def run(home: Path, workers: int | None, told: Callable[[Finding], None]) -> list[Finding]:
    """Run every self-test on the surrounding cluster or the local stack, which is started if need be.

    Args:
        home: holds the stack; a folder of it is used meanwhile, so every node must see it.
        workers: processes that train together; None for one on each node, and two at least.
        told: gets each finding as it comes.

    Raises:
        StackError: there is no stack, or it cannot be joined.
        TrainingError: the cluster has no room for the workers.
    """
    from cluster import pipeline, stack
    from training import ray_self_tests

    found: list[Finding] = []

    def keep(finding: Finding) -> None:
        found.append(finding)
        told(finding)

    pipeline.connect(stack.attach(home, say))
    group = ray_self_tests.run(home, workers, keep, lambda name, why: say(f"self-test {name}: {why} ..."))
    say(f"{group.workers} workers over {group.nodes} nodes{', a GPU each' if group.gpus else ''}")
    return found


def as_json(finding: Finding) -> dict[str, Any]:
    """A finding as ``darkroom doctor --json`` prints it, beside those of the machine."""
    return {**dataclasses.asdict(finding), "name": f"self-test {finding.name}"}


def figure(finding: Finding) -> str:
    """The measured value and what it may be."""
    if finding.figure is None or finding.tolerance is None:
        return "not measured"
    return f"{finding.figure:.2g}, {'at least' if finding.at_least else 'at most'} {finding.tolerance:g}"
