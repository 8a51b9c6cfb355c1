"""The benchmark's traffic, and its figures in counts: forwards and rows of the real engine, without a clock."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter
from contextlib import aclosing
from typing import Any

import pytest
from typing_extensions import override

from serving.config import BatchConfig
from serving.engine import Engine
from serving.observer import Silent
from serving.schemas import GenerationRequest, ImageReady
from serving.sizes import Sizes
from tests.benchmarks.serving_trace import GUIDED, LARGE, SIDES, STEPS, Asked, mean_cost_s, trace
from training.canvas import Canvas
from training.objectives import Denoiser

WIDTH = 8


def test_equal_seeds_give_equal_traces_and_the_rate_moves_the_times_alone() -> None:
    slow, again, fast = trace(1, 50, 2.0), trace(1, 50, 2.0), trace(1, 50, 4.0)
    assert slow == again
    assert [each.at_s for each in fast] == pytest.approx([each.at_s / 2 for each in slow])
    assert [each.body() for each in fast] == [each.body() for each in slow]
    assert [each.steps for each in trace(2, 50, 2.0)] != [each.steps for each in slow]


def test_requests_come_as_often_and_as_mixed_as_the_trace_says() -> None:
    asked = trace(0, 4000, 10.0)
    gaps = [later.at_s - each.at_s for each, later in itertools.pairwise(asked)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.1, rel=0.05)
    # the spread of a Poisson process's gaps is their mean
    assert math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) == pytest.approx(mean, rel=0.05)
    steps = Counter(each.steps for each in asked)
    assert {each: count / 4000 for each, count in steps.items()} == pytest.approx(STEPS, abs=0.03)
    assert sum(each.guided for each in asked) / 4000 == pytest.approx(GUIDED, abs=0.03)
    assert sum(each.side == SIDES[1] for each in asked) / 4000 == pytest.approx(LARGE, abs=0.03)


def test_an_infinite_rate_is_all_at_once() -> None:
    assert {each.at_s for each in trace(0, 20, math.inf)} == {0.0}


def test_what_a_request_costs_is_its_rows() -> None:
    asked = Asked(at_s=0, steps=20, guided=True, side=SIDES[0], prompt="ring", seed=1)
    assert asked.evaluations == 40
    assert asked.cost_s({SIDES[0]: 0.5, SIDES[1]: 9}) == 20
    share = sum(steps * share for steps, share in STEPS.items()) * (1 + GUIDED)
    assert mean_cost_s(dict.fromkeys(SIDES, 1.0)) == pytest.approx(share, rel=0.05)


class Counted(Silent):
    """Counts what the engine does, and which requests are over after how many steps."""

    def __init__(self) -> None:
        self.steps = 0
        self.rows = 0
        self.fill: list[float] = []
        self.over_after: dict[int, int] = {}

    @override
    def stepped(self, width: int, height: int, rows: int, padded_rows: int, seconds: float) -> None:
        self.steps += 1
        self.rows += rows
        self.fill.append(rows / padded_rows)

    @override
    def finished(self, request: GenerationRequest, seconds: float, outcome: Any) -> None:
        assert outcome == "done"
        self.over_after[request.seed] = self.steps


def replayed(denoiser: Denoiser, encoder: Any, asked: list[Asked]) -> Counted:
    """A trace whose requests are all here at once, on the real engine."""
    counted = Counted()

    async def one(engine: Engine, each: Asked) -> None:
        wanted = GenerationRequest(
            prompt="x",
            seed=each.seed,
            steps=each.steps,
            guidance_scale=3 if each.guided else 1,
            width=each.side // 2,
            height=each.side // 2,
        )
        async with aclosing(engine.submit(wanted)) as events:
            assert [event async for event in events if isinstance(event, ImageReady)]

    async def main() -> None:
        config = BatchConfig(padded_rows=WIDTH, max_batch_rows=WIDTH, max_waiting_images=len(asked))
        sizes = Sizes(((8, 8),), multiple=2, max_pixels=12 * 12)
        async with Engine(denoiser, encoder, canvas=Canvas(8), config=config, sizes=sizes, observer=counted) as engine:
            await asyncio.gather(*(one(engine, each) for each in asked))

    asyncio.run(main())
    return counted


def test_a_saturated_engine_fills_its_calls_and_takes_the_short_before_the_long(
    denoiser: Denoiser, encoder: Any
) -> None:
    asked = trace(2, 60, math.inf)
    counted = replayed(denoiser, encoder, asked)
    work = sum(each.evaluations for each in asked)
    assert counted.rows == work, "no row was denoised twice or for nobody"
    # their prompts are still being encoded at first; later on too few are left to fill a call of each size
    full = counted.fill[counted.steps // 8 : counted.steps // 2]
    assert sum(full) / len(full) >= 0.9
    over = {steps: [counted.over_after[each.seed] for each in asked if each.steps == steps] for steps in STEPS}
    assert max(over[4]) < counted.steps / 4
    assert sum(over[4]) / len(over[4]) * 4 < sum(over[50]) / len(over[50])
