"""Noise schedules against diffusers' own, at its thousand steps and between them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from training.objectives import CosineNoise, LinearNoise, NoiseScheduleConfig

SCHEDULES: dict[str, NoiseScheduleConfig] = {
    "cosine": CosineNoise(),
    "linear": LinearNoise(),
    "scaled_linear": LinearNoise(kind="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine to noise": CosineNoise(zero_terminal_snr=True),
    "linear to noise": LinearNoise(zero_terminal_snr=True),
    "scaled to noise": LinearNoise(kind="scaled_linear", beta_start=0.00085, beta_end=0.012, zero_terminal_snr=True),
    "shifted": LinearNoise(shift=3.0),
    "shifted to noise": CosineNoise(shift=0.5, zero_terminal_snr=True),
}
ALL = pytest.mark.parametrize("name", SCHEDULES)
AT_STEPS = (torch.arange(1000) + 1) / 1000


@ALL
def test_at_the_steps_it_is_diffusers(name: str) -> None:
    schedule = SCHEDULES[name]
    theirs = DDIMScheduler(**schedule.arguments()).alphas_cumprod
    assert torch.allclose(schedule.alpha(AT_STEPS).square(), theirs, atol=2e-6, rtol=2e-4)
    assert torch.allclose(schedule.sigma(AT_STEPS).square(), 1 - theirs, atol=2e-6)


@ALL
def test_it_falls_from_the_image_to_its_last_step_without_a_jump(name: str) -> None:
    schedule = SCHEDULES[name]
    t = torch.linspace(0, 1, 40001)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert (float(alpha[0]), float(sigma[0])) == (1.0, 0.0)
    assert bool((alpha.diff() <= 0).all())
    assert bool((sigma.diff() >= 0).all())
    assert float(alpha.diff().abs().max()) < 0.002
    assert torch.allclose(alpha.square() + sigma.square(), torch.ones_like(t), atol=1e-6)
    ends = schedule.zero_terminal_snr
    assert (float(alpha[-1]) == 0) == ends
    assert schedule.terminal_alpha == pytest.approx(float(alpha[-1]), rel=1e-5)


@ALL
def test_near_the_image_the_noise_keeps_its_digits(name: str) -> None:
    t = torch.tensor([1e-6, 1e-5, 1e-4])
    share = SCHEDULES[name].sigma(t).double().square() / t.double()
    assert torch.allclose(share, share[-1].expand(3), rtol=1e-4), "sigma squared is linear in the first step"


@ALL
@given(at=st.floats(1e-4, 1.0))
def test_the_time_of_a_ratio_is_the_ratios_time(name: str, at: float) -> None:
    schedule = SCHEDULES[name]
    t = torch.tensor([at])
    assert torch.allclose(schedule.time_at(schedule.ratio(t)), t, atol=1e-4)
    assert float(schedule.time_at(torch.tensor([torch.inf]))) == 1.0


def test_a_shift_multiplies_the_noise_over_the_image() -> None:
    t = torch.linspace(0.01, 1, 50)
    assert torch.allclose(LinearNoise(shift=3.0).ratio(t), 3 * LinearNoise().ratio(t), rtol=2e-2)
    assert torch.allclose(LinearNoise(shift=3.0).ratio(AT_STEPS), 3 * LinearNoise().ratio(AT_STEPS), rtol=1e-4)


def test_betas_make_the_schedule_again() -> None:
    for schedule in SCHEDULES.values():
        bars = np.cumprod(1 - schedule.betas())
        assert np.allclose(bars, schedule.alpha(AT_STEPS.double()).square().numpy(), atol=1e-8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "square"}, "'cosine', 'linear', 'scaled_linear'"),
        ({"kind": "cosine", "beta_start": 0.1}, "Extra inputs"),
        ({"kind": "linear", "beta_start": 0.5}, "beta_start 0.5 must be at most beta_end 0.02"),
        ({"kind": "linear", "shift": 0}, "greater than 0"),
    ],
)
def test_what_is_no_schedule_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter[NoiseScheduleConfig](NoiseScheduleConfig).validate_python(values)
