"""Every objective on data whose best denoiser is known, at equal noise against each other, and in a short training."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from training import noise
from training.conditioning import Conditioning
from training.config import load_recipe
from training.errors import ConfigError
from training.evaluate.held_out import draw as held_out_draw
from training.objectives import (
    Draws,
    Edm,
    Epsilon,
    LinearNoise,
    Network,
    ObjectiveConfig,
    RectifiedFlow,
    VPrediction,
    per_row,
)
from training.samplers import sample

READ = TypeAdapter[ObjectiveConfig](ObjectiveConfig)
SPREAD = 0.5
"""Standard deviation of the pictures, whose pixels are independent and normal."""
STABLE_DIFFUSION = LinearNoise(kind="scaled_linear", beta_start=0.00085, beta_end=0.012)
KINDS: dict[str, ObjectiveConfig] = {
    "rectified_flow": RectifiedFlow(time_shift=2.0),
    "v": VPrediction(),
    "v to noise": VPrediction(noise_schedule=LinearNoise(zero_terminal_snr=True, shift=2.0)),
    "epsilon": Epsilon(noise_schedule=STABLE_DIFFUSION),
    "edm": Edm(sigma_data=0.7),
}
ALL = pytest.mark.parametrize("name", KINDS)
ROWS = 256
CLEAN = SPREAD * torch.stack([noise.normal(0, row, "clean", shape=(3, 8, 8)) for row in range(ROWS)])
NOTHING = Conditioning(torch.zeros(ROWS, 1, 1), torch.ones(ROWS, 1, dtype=torch.bool))


def knowing(objective: ObjectiveConfig) -> Network:
    """The network that gives what is best for such pictures: the mean of all that could lie behind ``x``.

    For ``x = alpha clean + sigma noise`` that is ``alpha s^2 x / (alpha^2 s^2 + sigma^2)``; what each objective
    wants of it is written here once more, from its paper.
    """

    def best(x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2) * x

    def network(x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        if isinstance(objective, RectifiedFlow):
            at = per_row(t, x)
            return (x - best(x, 1 - at, at)) / at
        if isinstance(objective, Edm):
            level, data = per_row((4000 * t).exp(), x), objective.sigma_data
            whole = x * (level**2 + data**2).sqrt()
            c_out = level * data / (level**2 + data**2).sqrt()
            return (best(whole, torch.ones_like(level), level) - data**2 / (level**2 + data**2) * whole) / c_out
        at = t + 0.001  # the step's own number, from 0, is what the network is told
        alpha, sigma = (
            per_row(share(at), x) for share in (objective.noise_schedule.alpha, objective.noise_schedule.sigma)
        )
        clean = best(x, alpha, sigma)
        return (alpha * x - clean) / sigma if isinstance(objective, VPrediction) else (x - alpha * clean) / sigma

    return network


def drawn(objective: ObjectiveConfig) -> Draws:
    return objective.draw(0, [0] * ROWS, list(range(ROWS)), (3, 8, 8))


def least(objective: ObjectiveConfig, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[B]`` the best denoiser's mean squared error of the clean image, and its share in one of the output."""
    denoiser = objective.denoiser(knowing(objective))
    alpha, sigma = denoiser.alpha(t), denoiser.sigma(t)
    error = SPREAD**2 * sigma**2 / (alpha**2 * SPREAD**2 + sigma**2)
    level = sigma / alpha
    if isinstance(objective, Edm):
        return error, (level * objective.sigma_data) ** 2 / (level**2 + objective.sigma_data**2)
    return error, level**2 if isinstance(objective, Epsilon) else sigma**2


@ALL
def test_the_denoiser_of_a_network_that_knows_is_the_best_one(name: str) -> None:
    objective = KINDS[name]
    denoiser = objective.denoiser(knowing(objective))
    draws = drawn(objective)
    alpha, sigma = per_row(denoiser.alpha(draws.t), CLEAN), per_row(denoiser.sigma(draws.t), CLEAN)
    x = alpha * CLEAN + sigma * draws.noise
    wanted = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2) * x
    assert torch.allclose(denoiser(x, draws.t, NOTHING), wanted, atol=2e-4)


@ALL
def test_the_loss_of_a_network_that_knows_is_what_nobody_can_know(name: str) -> None:
    objective = KINDS[name]
    draws = drawn(objective)
    error, gain = least(objective, draws.t)
    losses = objective.loss(knowing(objective), CLEAN, NOTHING, draws)
    assert losses.shape == (ROWS,)
    share = losses / (error / gain)
    assert float(share.mean()) == pytest.approx(1, abs=0.02), "192 pixels of 256 rows"
    assert float((share - 1).abs().max()) < 0.6


@ALL
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weighs_the_clean_images_error(name: str, gamma: float) -> None:
    objective = KINDS[name]
    weighted = objective.model_copy(update={"min_snr_gamma": gamma})
    draws = drawn(objective)
    network = knowing(objective)
    denoiser = objective.denoiser(network)
    snr = (denoiser.alpha(draws.t) / denoiser.sigma(draws.t)).square()
    _, gain = least(objective, draws.t)
    plain = objective.loss(network, CLEAN, NOTHING, draws)
    assert torch.allclose(
        weighted.loss(network, CLEAN, NOTHING, draws), plain * gain * snr.clamp(max=gamma), rtol=1e-3, atol=1e-7
    )


def test_min_snr_is_the_papers_for_epsilon_and_v() -> None:
    draws = drawn(KINDS["epsilon"])
    for kind, weight in (
        (Epsilon(noise_schedule=STABLE_DIFFUSION), lambda snr: snr.clamp(max=5) / snr),
        (VPrediction(noise_schedule=STABLE_DIFFUSION), lambda snr: snr.clamp(max=5) / (snr + 1)),
    ):
        snr = kind.noise_schedule.ratio(draws.t).square().reciprocal()
        plain = kind.loss(lambda x, *_: torch.sin(x), CLEAN, NOTHING, draws)
        weighted = kind.model_copy(update={"min_snr_gamma": 5.0}).loss(
            lambda x, *_: torch.sin(x), CLEAN, NOTHING, draws
        )
        assert torch.allclose(weighted, plain * weight(snr), rtol=1e-3, atol=1e-7)


def test_weights_are_finite_at_pure_noise() -> None:
    at_noise = Draws(torch.ones(ROWS), drawn(KINDS["v"]).noise, torch.ones(ROWS, dtype=torch.bool))
    for name in ("rectified_flow", "v to noise"):
        objective = KINDS[name].model_copy(update={"min_snr_gamma": 5.0})
        assert torch.equal(objective.loss(lambda x, *_: x, CLEAN, NOTHING, at_noise), torch.zeros(ROWS))


def test_equally_good_networks_have_equal_held_out_losses_whatever_they_predict() -> None:
    draws = held_out_draw(list(range(ROWS)), 1, 3, (3, 8, 8))
    losses = {name: kind.velocity_loss(knowing(kind), CLEAN, NOTHING, draws) for name, kind in KINDS.items()}
    for name, found in losses.items():
        assert torch.allclose(found, losses["rectified_flow"], rtol=2e-3), name


def test_beyond_its_schedule_a_network_is_asked_at_its_own_end() -> None:
    objective = KINDS["epsilon"]
    asked: list[torch.Tensor] = []

    def network(x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        asked.append(t)
        return torch.zeros_like(x)

    draws = Draws(torch.full((ROWS,), 0.999), drawn(objective).noise, torch.ones(ROWS, dtype=torch.bool))
    assert bool(objective.velocity_loss(network, CLEAN, NOTHING, draws).isfinite().all())
    assert torch.allclose(asked[0], torch.tensor(0.999))


@ALL
def test_sampling_with_a_network_that_knows_gives_such_pictures(name: str) -> None:
    objective = KINDS[name]
    start = torch.stack([noise.normal(1, row, "start", shape=(3, 8, 8)) for row in range(ROWS)])
    found = sample(objective.denoiser(knowing(objective)), start, NOTHING, objective.grid(160), sampler="dpmpp_2m")
    assert float(found.std()) == pytest.approx(SPREAD, rel=0.01)
    assert abs(float(found.mean())) < 0.01


@ALL
@given(steps=st.integers(1, 60))
def test_a_grid_falls_from_one_to_zero(name: str, steps: int) -> None:
    grid = KINDS[name].grid(steps)
    assert (grid.dtype, grid.shape) == (torch.float32, (steps + 1,))
    assert (float(grid[0]), float(grid[-1])) == (1.0, 0.0)
    assert bool((grid.diff() < 0).all())
    denoiser = KINDS[name].denoiser(knowing(KINDS[name]))
    assert (float(denoiser.alpha(grid[-1:])), float(denoiser.sigma(grid[-1:]))) == (1.0, 0.0)


def test_more_steps_than_the_schedule_has_lie_between_its_own() -> None:
    assert bool((VPrediction().grid(3000).diff() < 0).all())


@ALL
def test_draws_are_each_rows_own_and_captions_are_dropped(name: str) -> None:
    objective = KINDS[name].model_copy(update={"caption_dropout": 0.4})
    whole = objective.draw(3, [0] * 200, list(range(200)), (1, 2, 2))
    part = objective.draw(3, [0, 0], [7, 150], (1, 2, 2))
    assert torch.equal(whole.t[[7, 150]], part.t)
    assert torch.equal(whole.noise[[7, 150]], part.noise)
    assert 0 < float(whole.t.min()) < float(whole.t.max()) <= 1
    assert 0.25 < 1 - float(whole.keep_caption.float().mean()) < 0.55


def test_the_times_of_diffusion_are_even_over_its_steps_and_edms_levels_are_log_normal() -> None:
    rows = [0] * 4000, list(range(4000))
    t = VPrediction().draw(0, *rows, (1, 1, 1)).t
    assert 0.001 <= float(t.min()) < 0.003 < 0.997 < float(t.max()) <= 1
    assert float(t.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(t.std()) == pytest.approx(12**-0.5, abs=0.01)
    logs = Edm().level(Edm().draw(0, *rows, (1, 1, 1)).t).log()
    assert float(logs.mean()) == pytest.approx(-1.2, abs=0.08)
    assert float(logs.std()) == pytest.approx(1.2, abs=0.06)


@ALL
def test_offset_noise_is_one_value_per_channel_and_changes_no_other_draw(name: str) -> None:
    plain = drawn(KINDS[name])
    offset = drawn(KINDS[name].model_copy(update={"offset_noise": 0.1}))
    assert torch.equal(offset.t, plain.t)
    assert torch.equal(offset.keep_caption, plain.keep_caption)
    added = offset.noise - plain.noise
    assert torch.allclose(added, added[:, :, :1, :1].expand_as(added), atol=1e-6)
    assert float(added[:, :, 0, 0].std()) == pytest.approx(0.1, rel=0.1)


@given(st.integers(0, 999))
def test_a_pretrained_network_is_told_its_own_steps(step: int) -> None:
    asked: list[torch.Tensor] = []

    def network(x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        asked.append(t * 1000)  # as the network contract has it
        return x

    VPrediction().denoiser(network)(CLEAN[:1], torch.tensor([(step + 1) / 1000]), NOTHING)
    assert float(asked[0]) == pytest.approx(step, abs=2e-4)


@pytest.mark.parametrize(
    ("values", "rules"),
    [
        ({"kind": "gan"}, ["'rectified_flow', 'v', 'epsilon', 'edm'"]),
        (
            {"kind": "epsilon", "noise_schedule": {"kind": "linear", "zero_terminal_snr": True}},
            ["in pure noise the noise says nothing of the image", "objective.kind v"],
        ),
        (
            {"kind": "epsilon", "noise_schedule": {"kind": "cosine"}},
            ["leaves 4.9e-05 of the image at its last step", "epsilon needs 0.005", "linear or scaled_linear"],
        ),
        ({"kind": "edm", "sigma_min": 90}, ["sigma_min 90.0 must be below sigma_max 80.0"]),
        ({"kind": "edm", "time_shift": 3}, ["unknown key objective.time_shift", "sigma_data"]),
        ({"kind": "v", "min_snr_gamma": 0}, ["greater than 0"]),
    ],
)
def test_what_is_no_objective_is_refused_with_what_would_work(values: dict[str, object], rules: list[str]) -> None:
    with pytest.raises(ValidationError):
        READ.validate_python(values)
    with pytest.raises(ConfigError) as refused:
        load_recipe("base", [f"objective={values!r}"])
    for rule in rules:
        assert rule in str(refused.value)


@ALL
def test_an_objective_outlives_json(name: str) -> None:
    assert READ.validate_json(KINDS[name].model_dump_json()) == KINDS[name]


def test_a_recipe_that_names_no_kind_is_rectified_flow() -> None:
    assert load_recipe("base", ["objective.time_shift=3"]).objective == RectifiedFlow(time_shift=3)
    assert load_recipe("base", ["objective.kind=v"]).objective == VPrediction()


def test_the_loss_of_rectified_flow_is_this() -> None:
    """A run that goes on with a newer version must see the same numbers."""
    objective = RectifiedFlow(time_shift=2.0)
    draws = objective.draw(7, [0, 2], [5, 5], (1, 1, 2))
    clean = torch.tensor([0.25, -0.5, 0.75, 0.125]).reshape(2, 1, 1, 2)
    losses = objective.loss(lambda x, t, _: x * per_row(t, x), clean, NOTHING, draws)
    assert losses.tolist() == pytest.approx([0.10166997, 0.13319807], abs=1e-7)


@ALL
def test_a_short_training_learns(name: str) -> None:
    """A small convolutional network, told the time, on pictures of one colour each."""
    objective = KINDS[name]
    torch.manual_seed(0)
    colours = torch.stack([noise.normal(3, row, shape=(3, 1, 1)) for row in range(64)]).clamp(-1, 1) * 0.8
    clean = colours.expand(64, 3, 8, 8).contiguous()
    body = torch.nn.Sequential(
        torch.nn.Conv2d(5, 32, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(32, 32, 5, padding=2), torch.nn.SiLU()
    )
    layers = torch.nn.Sequential(body, torch.nn.Conv2d(32, 3, 3, padding=1))

    def network(x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        told = per_row(t * (1000 if name == "edm" else 1), x).expand(-1, 1, 8, 8)
        return layers(torch.cat([x, told, told.square()], 1))

    def measured() -> float:
        draws = held_out_draw(list(range(64)), 0, 1, (3, 8, 8))
        with torch.no_grad():
            return float(objective.velocity_loss(network, clean, NOTHING, draws).mean())

    optimizer = torch.optim.AdamW(layers.parameters(), lr=3e-3)
    before, losses = measured(), []
    for step in range(120):
        loss = objective.loss(
            network, clean, NOTHING, objective.draw(0, [step] * 64, list(range(64)), (3, 8, 8))
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-20:]) < sum(losses[:5]) / 5 * 20 * 0.8
    assert measured() < before / 2
    assert math.isfinite(losses[-1])
