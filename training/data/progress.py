"""What a build tells while it works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["compare", "judge", "decide", "write"]


@dataclass(frozen=True)
class Step:
    """How far a stage is.

    Attributes:
        stage: comparing with a finished result, judging inputs, deciding over the set, writing shards.
        done: inputs, or samples where shards are written.
        total: in all; None while it is not known.
        found: inputs among them that an earlier try had judged already.
        dropped: inputs among them that were dropped.
    """

    stage: Stage
    done: int
    total: int | None
    found: int = 0
    dropped: int = 0


Progress = Callable[[Step], None]


def silent(_step: Step) -> None:
    """No progress is shown."""
