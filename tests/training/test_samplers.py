"""Each sampler against diffusers' scheduler on the same network, and against what a denoiser's trajectory must be."""

import itertools

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.schedulers import scheduling_flow_match_lcm

from training import noise
from training.conditioning import Conditioning
from training.errors import UsageError
from training.objectives import FlowDenoiser, per_row
from training.samplers import Trajectory, advance, sample, times
from training.sampling_config import SAMPLERS, STOCHASTIC, SamplerName

NOISE = torch.stack([noise.normal(0, row, "noise", shape=(3, 4, 4)) for row in range(2)])
NOTHING = Conditioning(torch.zeros(2, 1, 1), torch.ones(2, 1, dtype=torch.bool))


def velocity(x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    """A network curved in both of its arguments, so that no two methods agree by chance."""
    return torch.sin(3 * x + 2 * per_row(t, x)) + 0.4 * x * per_row(t, x)


def drawn(sampler: SamplerName, steps: int) -> list[torch.Tensor]:
    """The noise that a sampler draws at each step for the seeds 5 and 6."""
    rows = [[noise.normal(seed, sampler, step, shape=(3, 4, 4)) for seed in (5, 6)] for step in range(steps)]
    return [torch.stack(row) for row in rows]


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_heun_is_diffusers(steps: int) -> None:
    scheduler = FlowMatchHeunDiscreteScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(steps)
    grid = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2], scheduler.sigmas[-1:]])
    x = NOISE
    for at in scheduler.timesteps:
        x = scheduler.step(velocity(x, (at / 1000).expand(2), NOTHING), at, x).prev_sample
    found = sample(FlowDenoiser(velocity), NOISE, NOTHING, grid, sampler="heun")
    assert torch.allclose(found, x, atol=1e-4)
    assert not torch.allclose(found, sample(FlowDenoiser(velocity), NOISE, NOTHING, grid), atol=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_dpmpp_2m_is_diffusers(steps: int) -> None:
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.5, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    x = NOISE
    for at, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        x = scheduler.step(velocity(x, sigma.expand(2), NOTHING), at, x).prev_sample
    found = sample(FlowDenoiser(velocity), NOISE, NOTHING, scheduler.sigmas, sampler="dpmpp_2m")
    assert torch.allclose(found, x, atol=2e-5)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_lcm_is_diffusers(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduling_flow_match_lcm.FlowMatchLCMScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
    fresh = iter(drawn("lcm", steps))
    monkeypatch.setattr(scheduling_flow_match_lcm, "randn_tensor", lambda *_, **__: next(fresh))
    x = NOISE
    for at in scheduler.timesteps:
        x = scheduler.step(velocity(x, (at / 1000).expand(2), NOTHING), at, x).prev_sample
    found = sample(FlowDenoiser(velocity), NOISE, NOTHING, times(steps, 3.0), sampler="lcm", seeds=[5, 6])
    assert torch.allclose(found, x, atol=2e-5)


def test_eta_is_how_much_noise_is_drawn_anew() -> None:
    denoiser = FlowDenoiser(velocity)

    def made(eta: float, sampler: SamplerName = "ancestral") -> torch.Tensor:
        return sample(denoiser, NOISE, NOTHING, times(6), sampler=sampler, seeds=[5, 6], eta=eta)

    assert torch.allclose(made(0.0), made(0.0, "euler"), atol=1e-5)
    near, far = ((made(eta) - made(0.0)).abs().mean() for eta in (0.2, 1.0))
    assert 0 < near < far


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_ends_at_the_image_of_an_exact_denoiser(sampler: SamplerName) -> None:
    clean = NOISE.flip(0).clamp(-1, 1)
    exact = FlowDenoiser(lambda x, t, _: (x - clean) / per_row(t, x))
    for steps in (1, 2, 7):
        found = sample(exact, NOISE, NOTHING, times(steps, 2.0), sampler=sampler, seeds=[1, 2])
        assert torch.allclose(found, clean, atol=1e-5)


def test_the_higher_orders_come_closer_with_as_many_evaluations() -> None:
    denoiser = FlowDenoiser(velocity)
    truth = sample(denoiser, NOISE, NOTHING, times(2000))
    error = {
        "euler": (sample(denoiser, NOISE, NOTHING, times(20)) - truth).abs().mean(),
        "heun": (sample(denoiser, NOISE, NOTHING, times(10), sampler="heun") - truth).abs().mean(),
        "dpmpp_2m": (sample(denoiser, NOISE, NOTHING, times(20), sampler="dpmpp_2m") - truth).abs().mean(),
    }
    assert error["heun"] < error["euler"] / 2
    assert error["dpmpp_2m"] < error["euler"]


def test_trajectories_of_all_kinds_share_a_batch_bit_for_bit() -> None:
    denoiser = FlowDenoiser(velocity)

    def trajectories() -> list[Trajectory]:
        kinds = itertools.product(SAMPLERS, (1, 3, 4))
        return [Trajectory(NOISE[steps % 2], times(steps), name, seed=steps) for name, steps in kinds]

    def run(together: list[Trajectory]) -> None:
        while left := [each for each in together if not each.finished]:
            x, t = torch.stack([each.x for each in left]), torch.stack([each.t for each in left])
            advance(denoiser, left, denoiser(x, t, NOTHING))

    mixed, alone = trajectories(), trajectories()
    run(mixed)
    for each in alone:
        run([each])
    for one, other in zip(mixed, alone, strict=True):
        assert torch.equal(one.x, other.x)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_evaluations_left_are_those_that_come(sampler: SamplerName) -> None:
    denoiser, row = FlowDenoiser(velocity), Trajectory(NOISE[0], times(6), sampler)
    promised = []
    while not row.finished:
        promised.append(row.evaluations_left)
        advance(denoiser, [row], denoiser(row.x[None], row.t[None], NOTHING))
    assert promised == list(range(len(promised), 0, -1))


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_the_noise_that_is_drawn_on_the_way_is_the_pictures_own_seeds(sampler: SamplerName) -> None:
    denoiser = FlowDenoiser(velocity)
    start = NOISE[:1].expand(2, -1, -1, -1)
    first, second = sample(denoiser, start, NOTHING, times(5), sampler=sampler, seeds=[1, 2])
    assert not torch.equal(first, second)
    with pytest.raises(UsageError, match=f"The {sampler} sampler draws noise.*\n.*\n.*2 seeds, one per image"):
        sample(denoiser, start, NOTHING, times(5), sampler=sampler)
