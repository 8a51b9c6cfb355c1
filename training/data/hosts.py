"""Politeness: few downloads from one host at once, and none while it asks to be left alone."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Hosts:
    """Who is being asked just now; of hosts that are not, nothing is kept, however many there were."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._active: Counter[str] = Counter()
        self._pauses: dict[str, float] = {}
        self._changed = threading.Condition()

    @contextmanager
    def slot(self, host: str) -> Iterator[float]:
        """Wait for a place among the few downloads from this host, and for the end of its pause.

        Yields:
            How many seconds that took.
        """
        began = time.monotonic()
        with self._changed:
            while (wait := self._wait_s(host)) > 0 or self._active[host] >= self._at_once:
                self._changed.wait(wait or None)
            self._active[host] += 1
        try:
            yield time.monotonic() - began
        finally:
            with self._changed:
                self._active[host] -= 1
                if not self._active[host]:
                    del self._active[host]
                self._changed.notify_all()

    def pause(self, host: str, seconds: float) -> None:
        """The host asked for ``seconds`` of rest: no download of it begins before."""
        with self._changed:
            now = time.monotonic()
            self._pauses[host] = max(self._pauses.get(host, 0.0), now + seconds)
            self._pauses = {host: until for host, until in self._pauses.items() if until > now}

    def _wait_s(self, host: str) -> float:
        left = self._pauses.get(host, 0.0) - time.monotonic()
        if left <= 0:
            self._pauses.pop(host, None)
        return max(0.0, left)
