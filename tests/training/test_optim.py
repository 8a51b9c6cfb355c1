"""Learning-rate schedules by value and by shape, and the optimizer against AdamW written down."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from training.errors import ConfigError
from training.noise import normal
from training.optim import (
    AdafactorConfig,
    AdamWConfig,
    ConstantSchedule,
    CosineSchedule,
    MuonConfig,
    OptimizerConfig,
    ScheduleConfig,
    ScheduleFreeConfig,
    WarmupStableDecay,
)
from training.optim.muon_steps import orthogonal

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
    optimizer = config.build(iter([("weight", weight)]), {})
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


EVERY = (AdamWConfig(), AdafactorConfig(), ScheduleFreeConfig(), MuonConfig())


@pytest.mark.parametrize("config", EVERY, ids=lambda config: config.kind)
def test_an_optimizer_is_chosen_by_its_kind(config: Any) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(OptimizerConfig)
    assert adapter.validate_python({"kind": config.kind}) == config
    with pytest.raises(ValidationError, match="Extra inputs"):
        adapter.validate_python({"kind": config.kind, "rate": 1})
    assert adapter.validate_python({"weight_decay": 0.5}) == AdamWConfig(weight_decay=0.5), "where no kind is named"


@pytest.mark.parametrize("config", EVERY, ids=lambda config: config.kind)
def test_weights_with_a_factor_of_their_own_are_a_group_of_their_own(config: Any) -> None:
    weights = {name: torch.nn.Parameter(normal(0, name, shape=(4, 4))) for name in ("a", "b", "c")}
    groups = config.build(weights.items(), {"b": 0.5}).param_groups
    held = [(group["lr_scale"], [id(weight) for weight in group["params"]]) for group in groups]
    assert held == [(1.0, [id(weights["a"]), id(weights["c"])]), (0.5, [id(weights["b"])])]


@pytest.mark.parametrize("config", EVERY, ids=lambda config: config.kind)
def test_decay_takes_the_same_share_of_a_weight_whatever_its_rates_factor(config: Any) -> None:
    config = config.model_copy(update={"weight_decay": 0.5, "learning_rate": 0.1})
    weights = {name: torch.nn.Parameter(torch.ones(4, 4)) for name in ("narrow", "wide")}
    optimizer = config.build(weights.items(), {"wide": 0.25})
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * group["lr_scale"]
        for tensor in group["params"]:
            optimizer.state[tensor] = config.fresh(tensor, group)
            tensor.grad = torch.zeros_like(tensor)  # so that decay is all that happens
    if config.kind == "muon":
        optimizer.bind([], [(group, group["params"]) for group in optimizer.param_groups])
    optimizer.step()
    for weight in weights.values():
        assert torch.allclose(weight.detach(), torch.full((4, 4), 0.95))


@pytest.mark.parametrize("config", EVERY, ids=lambda config: config.kind)
def test_the_state_made_beforehand_is_what_the_optimizer_would_have_made_itself(config: Any) -> None:
    """Shapes, names and steps: a run goes on from a checkpoint before its first step."""
    ends = []
    for beforehand in (True, False):
        weight = torch.nn.Parameter(normal(0, "weight", shape=(6, 4)))
        bias = torch.nn.Parameter(normal(0, "bias", shape=(6,)))
        optimizer = config.build([("weight", weight), ("bias", bias)], {})
        for group in optimizer.param_groups:
            for tensor in group["params"] if beforehand or config.kind == "muon" else ():
                optimizer.state[tensor] = config.fresh(tensor, group)
        if config.kind == "muon":
            optimizer.bind([], [(group, group["params"]) for group in optimizer.param_groups])  # type: ignore[attr-defined]
        for step in range(3):
            for tensor in (weight, bias):
                tensor.grad = normal(1, step, shape=tuple(tensor.shape))
            optimizer.step()
        state = {key: value for values in optimizer.state.values() for key, value in values.items()}
        ends.append((weight.detach(), bias.detach(), {key: tuple(value.shape) for key, value in state.items()}))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])
    assert ends[0][2] == ends[1][2]


@pytest.mark.parametrize("shape", [(8, 8), (16, 6), (5, 20)])
def test_an_orthogonal_matrix_has_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = normal(0, shape=shape)
    values = torch.linalg.svdvals(orthogonal(matrix, 5))
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    cosine = float((orthogonal(matrix, 5) * (u @ v)).sum()) / float(orthogonal(matrix, 5).norm() * (u @ v).norm())
    assert cosine > 0.97, "in the direction of the nearest one"


def test_muon_steps_as_torchs_own_does() -> None:
    """torch's iterates in bf16, ours in fp32 on a CPU."""
    config = MuonConfig(learning_rate=0.02, momentum=0.9, weight_decay=0.1)
    ours, theirs = (torch.nn.Parameter(normal(0, "weight", shape=(12, 8))) for _ in range(2))
    optimizer = config.build([("layer.weight", ours)], {})
    optimizer.state[ours] = config.fresh(ours, optimizer.param_groups[0])
    optimizer.bind([], [(optimizer.param_groups[0], [ours])])  # type: ignore[attr-defined]
    other = torch.optim.Muon([theirs], lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    start = ours.detach().clone()
    for step in range(5):
        for weight in (ours, theirs):
            weight.grad = normal(1, step, shape=(12, 8))
        optimizer.step()
        other.step()
    moved = float((ours - start).detach().norm())
    assert float((ours - theirs).detach().norm()) < 0.02 * moved


def test_a_network_without_matrices_is_not_muons() -> None:
    filters = torch.nn.Parameter(torch.zeros(4, 4, 3, 3))
    with pytest.raises(ConfigError, match=r"no matrix of a linear layer(.|\n)*adamw"):
        MuonConfig().build([("conv_in.weight", filters)], {})
