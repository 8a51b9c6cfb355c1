"""The samplers on networks that predict v, noise or EDM's output, against diffusers' schedulers for them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EDMDPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from diffusers.schedulers import scheduling_euler_ancestral_discrete, scheduling_lcm

from training import noise
from training.conditioning import Conditioning
from training.objectives import CosineNoise, Edm, Epsilon, LinearNoise, ObjectiveConfig, VPrediction, per_row
from training.samplers import sample
from training.sampling_config import SamplerName

NOISE = torch.stack([noise.normal(0, row, "noise", shape=(3, 4, 4)) for row in range(2)])
NOTHING = Conditioning(torch.zeros(2, 1, 1), torch.ones(2, 1, dtype=torch.bool))
STABLE_DIFFUSION = LinearNoise(kind="scaled_linear", beta_start=0.00085, beta_end=0.012)
DIFFUSIONS = {
    "v": VPrediction(noise_schedule=STABLE_DIFFUSION),
    "epsilon": Epsilon(noise_schedule=STABLE_DIFFUSION),
    "shifted": VPrediction(noise_schedule=STABLE_DIFFUSION.model_copy(update={"shift": 2.0})),
    "cosine": VPrediction(noise_schedule=CosineNoise(zero_terminal_snr=True)),
}
"""By name; the last ends in pure noise, which is infinite where diffusers adds noise to images of full size."""


def network(x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    """Curved in both of its arguments, so that no two methods agree by chance, and as large as what it predicts."""
    return torch.sin(2 * x + 3 * per_row(t, x)) + 0.2 * x


def arguments(objective: VPrediction | Epsilon) -> dict[str, Any]:
    """The schedule and the output, as every scheduler of diffusers calls them."""
    return {**objective.noise_schedule.arguments(), "prediction_type": objective.prediction_type}


def follow(scheduler: Any, start: torch.Tensor, **options: Any) -> torch.Tensor:
    """What a pipeline of diffusers does, from its own first scale to its last step."""
    x = start
    for at in scheduler.timesteps:
        told = scheduler.scale_model_input(x, at)
        x = scheduler.step(network(told, (at / 1000).expand(2), NOTHING), at, x, **options).prev_sample
    assert float(x.abs().max()) < 1000
    return x


def replay(monkeypatch: pytest.MonkeyPatch, module: ModuleType, sampler: str, steps: int) -> None:
    """Let a scheduler draw the noise that our sampler draws for the seeds 5 and 6."""
    rows = [[noise.normal(seed, sampler, step, shape=(3, 4, 4)) for seed in (5, 6)] for step in range(steps)]
    fresh = iter([torch.stack(row) for row in rows])
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(fresh))


def made(objective: ObjectiveConfig, steps: int, sampler: SamplerName = "euler", **options: Any) -> torch.Tensor:
    """Our pictures, at the times that a bundle's pipeline takes."""
    grid = objective.grid(steps)
    return sample(objective.denoiser(network), NOISE, NOTHING, grid, sampler=sampler, seeds=[5, 6], **options)


def same(found: torch.Tensor, wanted: torch.Tensor, atol: float = 1e-4) -> bool:
    assert float((wanted - NOISE).abs().mean()) > 0.1, "something happened"
    return torch.allclose(found, wanted, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 3, 15, 28])
@pytest.mark.parametrize("name", DIFFUSIONS)
def test_the_bundles_scheduler_is_euler_at_any_number_of_steps(name: str, steps: int) -> None:
    objective = DIFFUSIONS[name]
    scheduler = objective.scheduler()
    scheduler.set_timesteps(steps)
    assert float(scheduler.init_noise_sigma) == 1
    assert torch.equal((objective.grid(steps)[:-1] * 1000).round().long() - 1, scheduler.timesteps)
    # where the schedule ends in pure noise, that scheduler has 2 ** -12 of the image left
    assert same(made(objective, steps), follow(scheduler, NOISE), 5e-3 if name == "cosine" else 1e-4)


@pytest.mark.parametrize("steps", [2, 5, 20])
@pytest.mark.parametrize(
    ("name", "eta"),
    # from pure noise and with eta 1, diffusers takes the root of a variance just below 0
    [(name, eta) for name in DIFFUSIONS for eta in (0.0, 0.5, 1.0) if (name, eta) != ("cosine", 1.0)],
)
def test_ancestral_is_ddim_at_every_eta(name: str, eta: float, steps: int) -> None:
    objective = DIFFUSIONS[name]
    scheduler = DDIMScheduler(**arguments(objective), clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    x = NOISE
    for step, at in enumerate(scheduler.timesteps):
        fresh = torch.stack([noise.normal(seed, "ancestral", step, shape=(3, 4, 4)) for seed in (5, 6)])
        output = network(x, (at / 1000).expand(2), NOTHING)
        x = scheduler.step(output, at, x, eta=eta, variance_noise=fresh if eta else None).prev_sample
    assert same(made(objective, steps, "ancestral", eta=eta), x)
    if not eta:
        assert same(made(objective, steps), x)


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("name", ["v", "epsilon", "shifted"])
def test_dpmpp_2m_is_diffusers(name: str, steps: int) -> None:
    objective = DIFFUSIONS[name]
    scheduler = type(objective.scheduler()).from_config(objective.scheduler().config, solver_order=2)
    scheduler.set_timesteps(steps)
    assert same(made(objective, steps, "dpmpp_2m"), follow(scheduler, NOISE))


@pytest.mark.parametrize("steps", [2, 5, 20])
@pytest.mark.parametrize("name", ["v", "epsilon", "shifted"])
def test_euler_heun_and_ancestral_are_k_diffusions(name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = DIFFUSIONS[name]
    known = {**arguments(objective), "timestep_spacing": "trailing"}
    full_size = NOISE / objective.denoiser(network).alpha(torch.ones(1))
    euler = EulerDiscreteScheduler(**known)
    euler.set_timesteps(steps)
    assert same(made(objective, steps), follow(euler, full_size))
    module = scheduling_euler_ancestral_discrete
    ancestral = module.EulerAncestralDiscreteScheduler(**known)
    ancestral.set_timesteps(steps)
    replay(monkeypatch, module, "ancestral", steps)
    assert same(made(objective, steps, "ancestral"), follow(ancestral, full_size))
    heun = HeunDiscreteScheduler(**{key: value for key, value in known.items() if key != "rescale_betas_zero_snr"})
    heun.set_timesteps(steps)
    assert same(made(objective, steps, "heun"), follow(heun, full_size), 2e-4)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", DIFFUSIONS)
def test_lcm_is_diffusers(name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = DIFFUSIONS[name]
    scheduler = scheduling_lcm.LCMScheduler(**arguments(objective))
    scheduler.set_timesteps(timesteps=((objective.grid(steps)[:-1] * 1000).round().long() - 1).tolist())
    replay(monkeypatch, scheduling_lcm, "lcm", steps)
    assert same(made(objective, steps, "lcm"), follow(scheduler, NOISE))


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_edm_is_diffusers(steps: int) -> None:
    objective = Edm(sigma_data=0.6, sigma_max=40.0)
    euler = objective.scheduler()
    euler.set_timesteps(steps)
    full_size = NOISE * euler.init_noise_sigma
    assert torch.allclose(objective.level(objective.grid(steps)), euler.sigmas, rtol=1e-4)
    assert same(made(objective, steps), follow(euler, full_size))
    if steps > 1:  # that scheduler divides by the number of intervals
        multistep = EDMDPMSolverMultistepScheduler(sigma_data=0.6, sigma_max=40.0)
        multistep.set_timesteps(steps)
        assert same(made(objective, steps, "dpmpp_2m"), follow(multistep, full_size))


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_heun_on_edm_is_algorithm_1_of_its_paper(steps: int) -> None:
    objective = Edm()
    levels = objective.level(objective.grid(steps))
    denoiser = objective.denoiser(network)

    def slope(x: torch.Tensor, at: int) -> torch.Tensor:
        norm = (1 + levels[at] ** 2).sqrt()
        return (x - denoiser(x / norm, objective.grid(steps)[at].expand(2), NOTHING)) / levels[at]

    x = NOISE * (1 + levels[0] ** 2).sqrt()
    for step in range(steps):
        first = slope(x, step)
        moved = x + (levels[step + 1] - levels[step]) * first
        if step + 1 < steps:
            moved = x + (levels[step + 1] - levels[step]) * (first + slope(moved, step + 1)) / 2
        x = moved
    assert same(made(objective, steps, "heun"), x, 2e-4)
