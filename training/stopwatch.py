"""Where the time of a step goes, measured without stopping the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

HOST_SECTIONS = frozenset({"data", "evaluation", "checkpoint"})
"""Sections in which the host works or waits: its clock measures them on every device."""


class Stopwatch:
    """Adds up the seconds of named sections: ``with clock("forward"): ...``.

    A section inside another stops the outer one while it lasts, so the sections never count a second twice. On a GPU
    a section is what the device spends on the work that was queued inside it: CUDA events mark its ends and are read
    once they have passed, so nothing waits for the device.

    Args:
        cuda: whether the work is queued on a GPU.

    Attributes:
        step: the step that is worked on, 1-based; whoever takes steps sets it.
        failed: the innermost section that an error left; empty as long as none did.
        moves: sections begun or ended so far; the same on every rank that has come as far.
    """

    def __init__(self, cuda: bool = False) -> None:
        self._cuda = cuda
        self.step = 0
        self.moves = 0
        self.failed = ""
        self._open: list[str] = []
        self._began: float | torch.cuda.Event = 0.0
        self._unread: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._totals: dict[str, float] = {}
        self._lapped: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a section."""
        if self._open:
            self._end(self._open[-1])
        self._open.append(name)
        self._begin(name)
        try:
            yield
        except BaseException:
            self.failed = self.failed or name
            raise
        finally:
            self._end(self._open.pop())
            if self._open:
                self._begin(self._open[-1])

    @property
    def section(self) -> str:
        """The section that is open, for another thread; empty between sections."""
        return next(iter(self._open[-1:]), "")

    def totals(self, wait: bool = False) -> dict[str, float]:
        """Seconds of every section so far.

        Args:
            wait: for work that the device has not done yet; without, that work is in a later answer.
        """
        while self._unread:
            name, began, ended = self._unread[0]
            if not ended.query():
                if not wait:
                    break
                ended.synchronize()
            self._add(name, began.elapsed_time(ended) / 1000)
            self._unread.popleft()
        return dict(self._totals)

    def lap(self) -> dict[str, float]:
        """Seconds of every section since the last lap."""
        totals = self.totals()
        passed = {name: seconds - self._lapped.get(name, 0.0) for name, seconds in totals.items()}
        self._lapped = totals
        return passed

    def _begin(self, name: str) -> None:
        self.moves += 1
        self._began = self._mark() if self._on_device(name) else time.perf_counter()

    def _end(self, name: str) -> None:
        self.moves += 1
        if isinstance(self._began, float):
            self._add(name, time.perf_counter() - self._began)
        else:
            self._unread.append((name, self._began, self._mark()))

    def _on_device(self, name: str) -> bool:
        return self._cuda and name not in HOST_SECTIONS

    def _add(self, name: str, seconds: float) -> None:
        self._totals[name] = self._totals.get(name, 0.0) + seconds

    @staticmethod
    def _mark() -> torch.cuda.Event:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
