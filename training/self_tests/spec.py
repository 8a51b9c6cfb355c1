"""What a process of a self-test is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SelfTestSpec:
    """What one training process is told.

    Attributes:
        check: its name.
        phase: ``prepare`` ends in the death of the process, as if it had been killed.
        folder: empty at first, the same on every rank.
        rank: number of this process, 0-based.
        local_rank: its number on this node.
        world: how many there are.
        address: host of rank 0.
        port: a free port there.
    """

    check: str
    phase: Literal["prepare", "check"]
    folder: str
    rank: int
    local_rank: int
    world: int
    address: str
    port: int
