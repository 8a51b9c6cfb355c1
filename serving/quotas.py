"""How much each API key has used: token buckets, in memory or in a folder that replicas share.

A bucket holds at most one window's worth and fills evenly (Turner 1986, "leaky bucket as a meter"): nobody waits for a
clock to strike.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from serving.errors import QuotaError
from serving.keys import ApiKey

MINUTE_S = 60.0
DAY_S = 86_400.0

State = dict[str, tuple[float, float]]
"""By window: what is left, and when that was so, in seconds since 1970."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Standing:
    """One of a key's windows.

    Attributes:
        name: as the response's headers have it.
        unit: what is counted.
        limit: how many there are in a window.
        window_s: of the window.
        left: how many are left.
    """

    name: str
    unit: str
    limit: float
    window_s: float
    left: float

    def wait_s(self, wanted: float) -> float | None:
        """Seconds until so many are there; None is never."""
        if wanted > self.limit:
            return None
        return max(0.0, wanted - self.left) * self.window_s / self.limit

    @property
    def headers(self) -> dict[str, str]:
        """As OpenAI tells it."""
        reset_s = (self.limit - self.left) * self.window_s / self.limit
        return {
            f"x-ratelimit-limit-{self.name}": f"{self.limit:g}",
            f"x-ratelimit-remaining-{self.name}": f"{int(self.left)}",
            f"x-ratelimit-reset-{self.name}": duration(reset_s),
        }


def duration(seconds: float) -> str:
    """As OpenAI spells it: ``0s``, ``120ms``, ``6m0s``, ``23h59m4s``."""
    if 0 < seconds < 1:
        return f"{round(seconds * 1000)}ms"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if whole >= 60 else "") + f"{whole % 60}s"


@dataclass(frozen=True)
class Cost:
    """What a request uses.

    Attributes:
        images: how many.
        megapixel_steps: rows times evaluations times pixels / 1e6.
    """

    images: int
    megapixel_steps: float


class Ledger:
    """What keys have used.

    Args:
        folder: shared by all replicas; None counts in this process.
        clock: seconds since 1970.
    """

    def __init__(self, folder: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._clock = clock
        self._states: dict[str, State] = {}

    async def spend(self, key: ApiKey, cost: Cost) -> list[Standing]:
        """Use up what a request costs: all of it, or nothing.

        Raises:
            QuotaError: there is not enough in one of the windows.
        """
        return await self._changed(key, _amounts(key, cost), sign=1)

    async def give_back(self, key: ApiKey, cost: Cost) -> None:
        """Undo what was spent for nothing."""
        await self._changed(key, _amounts(key, cost), sign=-1)

    async def _changed(self, key: ApiKey, amounts: Sequence[tuple[Standing, float]], *, sign: int) -> list[Standing]:
        if not amounts:
            return []
        if self._folder is None:
            return self._change(self._states.setdefault(key.name, {}), amounts, sign)
        return await asyncio.to_thread(self._change_file, self._folder, key.name, amounts, sign)

    def _change_file(
        self, folder: Path, name: str, amounts: Sequence[tuple[Standing, float]], sign: int
    ) -> list[Standing]:
        with _locked(folder / f"{name}.json") as state:
            return self._change(state, amounts, sign)

    def _change(self, state: State, amounts: Sequence[tuple[Standing, float]], sign: int) -> list[Standing]:
        now_s = self._clock()
        found = []
        for window, amount in amounts:
            left, at_s = state.get(window.name, (window.limit, now_s))
            left = min(window.limit, left + max(0.0, now_s - at_s) * window.limit / window.window_s)
            found.append((Standing(window.name, window.unit, window.limit, window.window_s, left), sign * amount))
        for standing, amount in found:
            if amount > standing.left:
                raise _used_up(standing, amount)
        after = []
        for standing, amount in found:
            left = min(standing.limit, standing.left - amount)
            state[standing.name] = (left, now_s)
            after.append(Standing(standing.name, standing.unit, standing.limit, standing.window_s, left))
        return after


def _amounts(key: ApiKey, cost: Cost) -> list[tuple[Standing, float]]:
    """The key's windows, as if they were full, and what a request takes of each."""
    quota = key.quota
    windows = (
        ("images", "images", quota.images_per_minute, MINUTE_S, cost.images),
        ("images-day", "images", quota.images_per_day, DAY_S, cost.images),
        ("work-day", "megapixel-steps", quota.megapixel_steps_per_day, DAY_S, cost.megapixel_steps),
    )
    return [
        (Standing(name, unit, limit, window_s, limit), amount)
        for name, unit, limit, window_s, amount in windows
        if limit is not None
    ]


def _used_up(standing: Standing, wanted: float) -> QuotaError:
    wait_s = standing.wait_s(wanted)
    return QuotaError(standing.unit, wanted, standing.left, standing.limit, standing.window_s, wait_s)


@contextmanager
def _locked(path: Path) -> Iterator[State]:
    """A key's state on disk, which nobody else changes meanwhile; written back unless the body raises."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        state = _read(path, file.read())
        yield state
        text = json.dumps(state)
        file.seek(0)
        file.write(text)
        file.truncate(len(text))


def _read(path: Path, text: str) -> State:
    try:
        return {str(name): (float(left), float(at_s)) for name, (left, at_s) in json.loads(text or "{}").items()}
    except (ValueError, TypeError, AttributeError):
        log.warning("%s is damaged: its quota starts anew", path)
        return {}
