"""Learning-rate schedules by value and by shape, and the optimizer against AdamW written down."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from training.optim import AdamWConfig, ConstantSchedule, CosineSchedule, ScheduleConfig, WarmupStableDecay

STEPS = st.integers(1, 3000)
WARMUPS = st.integers(0, 300)
FLOORS = st.floats(0, 1)


def schedules(warmup: int, floor: float, share: float) -> list[Any]:
    return [
        ConstantSchedule(warmup_steps=warmup),
        CosineSchedule(warmup_steps=warmup, floor=floor),
        WarmupStableDecay(warmup_steps=warmup, floor=floor, decay_share=share),
    ]


@given(STEPS, WARMUPS, FLOORS, st.floats(0, 1))
def test_every_factor_is_a_positive_share_until_the_end(steps: int, warmup: int, floor: float, share: float) -> None:
    for schedule in schedules(warmup, floor, share):
        factors = [schedule.factor(step, steps) for step in {0, 1, steps // 3, steps // 2, steps - 1} if step < steps]
        assert all(0 < factor <= 1 for factor in factors), schedule
        assert all(math.isfinite(schedule.factor(step, steps)) for step in (steps, 2 * steps)), "also past the end"


@given(WARMUPS, st.integers(0, 3000))
def test_warm_up_is_a_line_from_above_zero_to_the_peak(warmup: int, step: int) -> None:
    factor = ConstantSchedule(warmup_steps=warmup).factor(step, 3001)
    assert factor == pytest.approx(min(1, (step + 1) / (warmup + 1)))
    assert ConstantSchedule(warmup_steps=warmup).factor(warmup, 3001) == 1


def test_no_warm_up_begins_at_the_peak() -> None:
    for schedule in schedules(0, 0.0, 0.2):
        assert schedule.factor(0, 100) == 1


@given(st.integers(2, 3000), FLOORS)
def test_the_cosine_falls_from_the_peak_to_its_floor(steps: int, floor: float) -> None:
    schedule = CosineSchedule(warmup_steps=0, floor=floor)
    assert schedule.factor(steps, steps) == pytest.approx(floor)
    assert schedule.factor(steps + 50, steps) == pytest.approx(floor), "and stays there"
    assert schedule.factor(steps // 2 * 2 // 2, steps // 2 * 2) == pytest.approx((1 + floor) / 2)
    some = [schedule.factor(step, steps) for step in range(0, steps, max(1, steps // 40))]
    assert all(later <= earlier for earlier, later in itertools.pairwise(some))


@given(st.integers(10, 3000), st.floats(0.05, 0.95), FLOORS)
def test_the_stable_stretch_is_at_the_peak_and_the_decay_is_a_line(steps: int, share: float, floor: float) -> None:
    schedule = WarmupStableDecay(warmup_steps=0, decay_share=share, floor=floor)
    border = steps * (1 - share)
    assert all(schedule.factor(step, steps) == 1 for step in {0, int(border) // 2, max(0, int(border) - 1)})
    for step in {math.ceil(border), (math.ceil(border) + steps) // 2, steps - 1}:
        left = (steps - step) / (share * steps)
        assert schedule.factor(step, steps) == pytest.approx(floor + (1 - floor) * min(1, left), abs=1e-9)
    assert schedule.factor(steps, steps) == pytest.approx(floor)


def test_no_decay_stays_at_the_peak_and_all_decay_begins_at_once() -> None:
    assert WarmupStableDecay(warmup_steps=0, decay_share=0).factor(999, 1000) == 1
    assert WarmupStableDecay(warmup_steps=0, decay_share=1, floor=0).factor(250, 1000) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (ConstantSchedule(warmup_steps=3), [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        (
            CosineSchedule(warmup_steps=1, floor=0.1),
            [0.5, 0.977975, 0.914058, 0.814503, 0.689058, 0.55, 0.410942, 0.285497, 0.185942, 0.122025],
        ),
        (
            WarmupStableDecay(warmup_steps=2, decay_share=0.5, floor=0.2),
            [1 / 3, 2 / 3, 1, 1, 1, 1, 0.84, 0.68, 0.52, 0.36],
        ),
    ],
)
def test_the_schedules_are_these(schedule: Any, factors: list[float]) -> None:
    assert [schedule.factor(step, 10) for step in range(10)] == pytest.approx(factors, abs=1e-6)


@pytest.mark.parametrize("kind", ["constant", "cosine", "wsd"])
def test_a_schedule_is_chosen_by_its_kind(kind: str) -> None:
    chosen = TypeAdapter(ScheduleConfig).validate_python({"kind": kind, "warmup_steps": 2})
    assert chosen.kind == kind
    with pytest.raises(ValidationError, match="Extra inputs"):
        TypeAdapter(ScheduleConfig).validate_python({"kind": kind, "warmup": 2})


def test_the_optimizer_is_adamw_with_the_recipes_numbers() -> None:
    config = AdamWConfig(learning_rate=0.01, beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=0.3)
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    gradients = [
        torch.tensor(row, dtype=torch.float64) for row in ([1.0, -1.0, 0.5], [0.1, 4.0, 0.0], [-2.0, 0.3, 1.0])
    ]
    optimizer = config.build(iter([weight]))
    expected = weight.detach().clone()
    first, second = torch.zeros_like(expected), torch.zeros_like(expected)
    for step, gradient in enumerate(gradients, start=1):
        weight.grad = gradient.clone()
        optimizer.step()
        # Loshchilov and Hutter 2019, algorithm 2
        first = 0.8 * first + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        scaled = first / (1 - 0.8**step) / ((second / (1 - 0.95**step)).sqrt() + 1e-6)
        expected = expected - 0.01 * (scaled + 0.3 * expected)
    assert torch.allclose(weight.detach(), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("field", "value"), [("learning_rate", 0), ("beta1", 1), ("beta2", -0.1), ("epsilon", 0), ("weight_decay", -1)]
)
def test_numbers_outside_their_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValidationError, match=field):
        AdamWConfig.model_validate({field: value})
