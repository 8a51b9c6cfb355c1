"""The traffic of the serving benchmark: one mixed open-loop trace, and who replays it."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from training import noise

STEPS = {4: 0.5, 20: 0.3, 50: 0.2}
"""Share of the requests with so many denoising steps."""
GUIDED = 0.5
"""Share of the requests with guidance, which doubles their rows."""
LARGE = 0.3
"""Share of the requests of the larger size."""
SIDES = (16, 24)
"""Of the pictures, in pixels."""
CLASSES = ("circle", "square", "star", "ring")
"""What the pictures show."""
_TIMEOUT_S = 300


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        at_s: when it comes.
        steps: denoising steps.
        guided: whether its picture takes two rows.
        side: of its picture, in pixels.
        prompt: a class.
        seed: of its picture.
    """

    at_s: float
    steps: int
    guided: bool
    side: int
    prompt: str
    seed: int

    @property
    def evaluations(self) -> int:
        """Rows that the network is asked about, in all."""
        return self.steps * (2 if self.guided else 1)

    def cost_s(self, row_s: Mapping[int, float]) -> float:
        """Seconds of the device, if a row of each size takes so many."""
        return self.evaluations * row_s[self.side]

    def body(self) -> dict[str, Any]:
        """In OpenAI's dialect."""
        return {
            "prompt": self.prompt,
            "size": f"{self.side}x{self.side}",
            "seed": self.seed,
            "num_inference_steps": self.steps,
            "guidance_scale": 3.0 if self.guided else 1.0,
        }


def trace(seed: int, count: int, per_s: float) -> list[Asked]:
    """Requests that come as a Poisson process, each of any kind whatever came before; equal seeds give equal traces.

    Args:
        seed: of the draw; the kinds do not depend on the rate.
        count: how many.
        per_s: how many come in a second on average; infinity has all of them come at once.
    """
    kinds, gaps = noise.generator(seed, "kinds"), noise.generator(seed, "gaps")
    at_s = 0.0
    asked = []
    for number in range(count):
        at_s += float(gaps.exponential()) / per_s
        asked.append(
            Asked(
                at_s=at_s,
                steps=int(kinds.choice(list(STEPS), p=list(STEPS.values()))),
                guided=bool(kinds.random() < GUIDED),
                side=SIDES[int(kinds.random() < LARGE)],
                prompt=str(kinds.choice(CLASSES)),
                seed=number,
            )
        )
    return asked


def mean_cost_s(row_s: Mapping[int, float], seed: int = 0, count: int = 2000) -> float:
    """Seconds of the device that a request takes on average, in calls that are full."""
    return statistics.mean(each.cost_s(row_s) for each in trace(seed, count, 1.0))


@dataclass(frozen=True)
class Answered:
    """What became of a trace.

    Attributes:
        asked: its requests.
        latency_s: of each, from the moment that it should come: a client that is late makes nobody look faster.
        wall_s: from the first moment to the last answer.
    """

    asked: Sequence[Asked]
    latency_s: Sequence[float]
    wall_s: float

    def p95_s(self) -> float:
        """Latency that 95 of 100 keep."""
        return statistics.quantiles(self.latency_s, n=20)[-1]

    def mean_s(self, steps: int) -> float:
        """Mean latency of the requests with so many steps."""
        return statistics.mean(
            took for each, took in zip(self.asked, self.latency_s, strict=True) if each.steps == steps
        )

    def images_per_s(self) -> float:
        """Over the whole trace."""
        return len(self.asked) / self.wall_s

    def share(self, row_s: Mapping[int, float]) -> float:
        """Work done in a second, in seconds of the best static batch."""
        return sum(each.cost_s(row_s) for each in self.asked) / self.wall_s


def replay(url: str, asked: Sequence[Asked]) -> Answered:
    """Send a trace's requests when they should come, whatever the answers do.

    Raises:
        HTTPStatusError: a request failed.
    """
    return asyncio.run(_replay(url, asked))


async def _replay(url: str, asked: Sequence[Asked]) -> Answered:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=_TIMEOUT_S, limits=limits) as client:
        started = time.monotonic()

        async def send(each: Asked) -> float:
            await asyncio.sleep(started + each.at_s - time.monotonic())
            answer = await client.post(f"{url}/v1/images/generations", json=each.body())
            answer.raise_for_status()
            return time.monotonic() - started - each.at_s

        latency_s = await asyncio.gather(*(send(each) for each in asked))
        return Answered(asked, latency_s, time.monotonic() - started)


def median_s(call: Callable[[], object], times: int) -> float:
    """Median seconds of a call, after a few that warm up."""
    taken = []
    for _ in range(times + 5):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[5:])
