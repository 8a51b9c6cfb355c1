"""Schedule-free AdamW's steps under DeepSpeed, which steps one parameter group at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from schedulefree import AdamWScheduleFree


class ScheduleFreeSteps(AdamWScheduleFree):  # type: ignore[misc]  # the library has no types
    """The library's, with steps that count only in the groups that take part: ZeRO 3 empties the others."""

    param_groups: list[dict[str, Any]]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """See ``AdamWScheduleFree``."""
        every = self.param_groups
        self.param_groups = [group for group in every if group["params"]]
        try:
            loss: float | None = super().step(closure)
        finally:
            self.param_groups = every
        return loss
