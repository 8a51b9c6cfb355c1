"""The objective and the samplers against what can be known exactly, and against diffusers' own scheduler."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.conditioning import Conditioning, ConditioningShape
from training.models import UNetConfig, apply
from training.noise import normal
from training.objectives import FlowDenoiser, RectifiedFlow
from training.samplers import Guided, euler_step, sample, times

SHAPE = (3, 4, 4)
NOTHING = Conditioning(torch.zeros(4, 1, 1), torch.ones(4, 1, dtype=torch.bool))
CLEAN = torch.stack([normal(0, row, "clean", shape=SHAPE) for row in range(4)]).clamp(-1, 1)
NOISE = torch.stack([normal(0, row, "noise", shape=SHAPE) for row in range(4)])

ROWS = st.lists(st.tuples(st.integers(-8, 10**6), st.integers(0, 10**9)), min_size=1, max_size=6)


def exact(x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    """The velocity of the path that ends at CLEAN: ``x = clean + t v``."""
    return (x - CLEAN) / t.reshape(-1, 1, 1, 1)


@dataclass(frozen=True)
class Told:
    """A network that says what it is told, so that guidance can be computed by hand."""

    weight: float = 0.3

    def __call__(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        told = (conditioning.tokens * conditioning.mask[..., None]).sum((1, 2)).reshape(-1, 1, 1, 1)
        return self.weight * x + told * t.reshape(-1, 1, 1, 1)


def told(*values: float) -> Conditioning:
    """One caption of one token per value."""
    return Conditioning(torch.tensor(values).reshape(-1, 1, 1), torch.ones(len(values), 1, dtype=torch.bool))


@pytest.fixture(scope="module")
def unet() -> torch.nn.Module:
    torch.manual_seed(0)
    config = UNetConfig(resolution=8, widths=(8, 16), attention=(False, True), head_width=8, norm_groups=4)
    network = config.build(ConditioningShape("text", 5, 12)).eval().requires_grad_(False)
    with torch.no_grad():  # a fresh output layer is so small that every sampler agrees
        network.conv_out.weight.mul_(20)
    return network


class TestDraws:
    @settings(max_examples=30)
    @given(st.integers(0, 2**31), ROWS, st.data())
    def test_a_row_depends_on_seed_epoch_and_sample_alone(
        self, seed: int, rows: list[tuple[int, int]], data: st.DataObject
    ) -> None:
        objective = RectifiedFlow()
        whole = objective.draw(seed, [epoch for epoch, _ in rows], [sample for _, sample in rows], SHAPE)
        chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8))
        part = objective.draw(seed, [rows[i][0] for i in chosen], [rows[i][1] for i in chosen], SHAPE)
        assert torch.equal(part.t, whole.t[chosen])
        assert torch.equal(part.noise, whole.noise[chosen])
        assert torch.equal(part.keep_caption, whole.keep_caption[chosen])

    def test_the_seed_the_epoch_and_the_sample_all_matter(self) -> None:
        objective = RectifiedFlow()
        rows = [objective.draw(seed, [e], [i], SHAPE) for seed in range(3) for e in range(-2, 3) for i in range(5)]
        assert len({float(row.t) for row in rows}) == len(rows)
        assert len({row.noise.numpy().tobytes() for row in rows}) == len(rows)

    def test_nobody_elses_generator_is_used_or_moved(self) -> None:
        objective = RectifiedFlow()
        torch.manual_seed(1)
        np.random.seed(1)
        first = objective.draw(0, [0], [0], SHAPE)
        after = torch.rand(3), np.random.rand(3)
        torch.manual_seed(1)
        np.random.seed(1)
        assert torch.equal(after[0], torch.rand(3))
        assert np.array_equal(after[1], np.random.rand(3))
        assert torch.equal(objective.draw(0, [0], [0], SHAPE).noise, first.noise)

    def test_times_are_logit_normal(self) -> None:
        count = 6000
        for mean, std in [(0.0, 1.0), (-0.8, 0.5)]:
            t = RectifiedFlow(logit_mean=mean, logit_std=std).draw(3, [0] * count, list(range(count)), (1, 1, 1)).t
            logits = torch.logit(t.double())
            assert t.min() > 0
            assert t.max() < 1
            assert abs(float(logits.mean()) - mean) < 4 * std / count**0.5
            assert abs(float(logits.std()) - std) < 4 * std / (2 * count) ** 0.5
            inside = (logits - mean).abs() < std
            assert abs(float(inside.double().mean()) - 0.6827) < 0.025, "normal, not just of that mean and width"

    def test_the_shift_moves_times_towards_noise_and_keeps_their_order(self) -> None:
        rows = [0] * 50, list(range(50))
        plain, shifted = (RectifiedFlow(time_shift=shift).draw(0, *rows, (1, 1, 1)).t for shift in (1.0, 3.0))
        assert torch.allclose(shifted, 3 * plain / (1 + 2 * plain))
        assert bool((shifted > plain).all())

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
    def test_captions_are_dropped_in_that_share(self, share: float) -> None:
        count = 4000
        kept = RectifiedFlow(caption_dropout=share).draw(0, [0] * count, list(range(count)), (1, 1, 1)).keep_caption
        assert kept.dtype == torch.bool
        assert abs(1 - float(kept.double().mean()) - share) <= 4 * (share * (1 - share) / count) ** 0.5

    def test_the_share_of_dropped_captions_changes_nothing_else(self) -> None:
        none, many = (
            RectifiedFlow(caption_dropout=share).draw(0, [0] * 9, list(range(9)), SHAPE) for share in (0, 0.9)
        )
        assert torch.equal(none.t, many.t)
        assert torch.equal(none.noise, many.noise)
        assert bool(none.keep_caption.all())
        assert not many.keep_caption.all()

    def test_noise_is_standard_normal(self) -> None:
        noise = RectifiedFlow().draw(0, [0] * 64, list(range(64)), (3, 16, 16)).noise
        assert noise.dtype == torch.float32
        assert abs(float(noise.mean())) < 0.02
        assert abs(float(noise.std()) - 1) < 0.02

    def test_the_draws_are_these(self) -> None:
        """A run that goes on with a newer version must see the same numbers."""
        drawn = RectifiedFlow().draw(7, [0, 2], [5, 5], (1, 1, 2))
        assert drawn.t.tolist() == pytest.approx([0.8364689, 0.7763392], abs=1e-6)
        assert drawn.noise.flatten().tolist() == pytest.approx([-0.5721536, -1.6422002, 1.5652355, 1.5529701], abs=1e-6)


class TestRectifiedFlow:
    def test_the_exact_velocity_has_no_loss(self) -> None:
        objective = RectifiedFlow()
        draws = objective.draw(0, [0] * 4, list(range(4)), SHAPE)
        losses = objective.loss(exact, CLEAN, NOTHING, draws)
        assert losses.shape == (4,)
        assert float(losses.max()) < 1e-9

    def test_the_loss_is_the_mean_square_of_the_rows_own_error(self) -> None:
        objective = RectifiedFlow()
        draws = objective.draw(0, [0] * 4, list(range(4)), SHAPE)
        error = torch.tensor([0.0, 0.5, -1.0, 2.0]).reshape(-1, 1, 1, 1)
        losses = objective.loss(lambda x, t, c: exact(x, t, c) + error, CLEAN, NOTHING, draws)
        assert losses.tolist() == pytest.approx([0.0, 0.25, 1.0, 4.0], abs=1e-4)

    def test_the_network_sees_the_noisy_image_and_the_time_of_each_row(self) -> None:
        objective = RectifiedFlow()
        draws = objective.draw(0, [0] * 4, list(range(4)), SHAPE)
        seen = []

        def network(x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
            seen.append((x, t, conditioning))
            return torch.zeros_like(x)

        losses = objective.loss(network, CLEAN, NOTHING, draws)
        ((x, t, conditioning),) = seen
        for row in range(4):
            share = draws.t[row]
            assert torch.allclose(x[row], (1 - share) * CLEAN[row] + share * draws.noise[row])
        assert torch.equal(t, draws.t)
        assert conditioning is NOTHING
        assert torch.allclose(losses, (draws.noise - CLEAN).square().mean((1, 2, 3)))

    @settings(max_examples=30)
    @given(st.lists(st.floats(1e-3, 1.0), min_size=4, max_size=4))
    def test_the_denoiser_of_the_exact_velocity_gives_the_clean_image(self, at: list[float]) -> None:
        t = torch.tensor(at)
        shares = t.reshape(-1, 1, 1, 1)
        denoiser = RectifiedFlow().denoiser(exact)
        found = denoiser((1 - shares) * CLEAN + shares * NOISE, t, NOTHING)
        assert torch.allclose(found, CLEAN, atol=1e-5)
        assert torch.allclose(denoiser.alpha(t) + denoiser.sigma(t), torch.ones(4))

    def test_the_denoiser_at_no_noise_is_the_image_itself(self) -> None:
        assert torch.equal(FlowDenoiser(Told())(CLEAN, torch.zeros(4), NOTHING), CLEAN)


class TestSampling:
    @pytest.mark.parametrize("steps", [1, 2, 7, 50])
    @pytest.mark.parametrize("shift", [1.0, 3.0])
    def test_the_exact_denoiser_leads_to_the_image_in_any_number_of_steps(self, steps: int, shift: float) -> None:
        found = sample(RectifiedFlow().denoiser(exact), NOISE, NOTHING, times(steps, shift))
        assert torch.allclose(found, CLEAN, atol=1e-5)

    @pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
    def test_times_fall_from_one_to_zero(self, shift: float) -> None:
        grid = times(10, shift)
        assert grid.shape == (11,)
        assert (float(grid[0]), float(grid[-1])) == (1.0, 0.0)
        assert bool((grid.diff() < 0).all())
        assert float(grid[5]) == pytest.approx(shift / (shift + 1))

    def test_rows_at_different_times_move_as_if_alone(self) -> None:
        denoiser = RectifiedFlow().denoiser(Told())
        t, t_next = torch.tensor([1.0, 0.7, 0.3, 0.1]), torch.tensor([0.9, 0.2, 0.25, 0.0])
        captions = told(0.0, 0.5, -0.5, 1.0)
        together = euler_step(denoiser, NOISE, denoiser(NOISE, t, captions), t, t_next)
        for row in range(4):
            one = slice(row, row + 1)
            clean = denoiser(NOISE[one], t[one], captions.rows(one))
            assert torch.equal(euler_step(denoiser, NOISE[one], clean, t[one], t_next[one]), together[one])

    def test_a_step_is_eulers(self) -> None:
        denoiser = RectifiedFlow().denoiser(Told())
        t, t_next = torch.tensor([1.0, 0.7, 0.3, 0.1]), torch.tensor([0.9, 0.2, 0.25, 0.0])
        captions = told(0.0, 0.5, -0.5, 1.0)
        moved = euler_step(denoiser, NOISE, denoiser(NOISE, t, captions), t, t_next)
        velocity = Told()(NOISE, t, captions)
        assert torch.allclose(moved, NOISE + (t_next - t).reshape(-1, 1, 1, 1) * velocity, atol=1e-6)

    def test_guidance_of_one_is_no_guidance(self) -> None:
        denoiser = RectifiedFlow().denoiser(Told())
        guided = Guided(denoiser, told(9.0, 9.0, 9.0, 9.0), torch.ones(4))
        captions = told(0.0, 0.5, -0.5, 1.0)
        plain = sample(denoiser, NOISE, captions, times(5))
        assert torch.allclose(sample(guided, NOISE, captions, times(5)), plain, atol=1e-5)

    def test_guidance_reaches_beyond_the_caption_away_from_the_negative_each_row_its_own(self) -> None:
        denoiser = RectifiedFlow().denoiser(Told())
        captions, negative = told(1.0, 1.0, 1.0, 1.0), told(0.0, 0.0, 0.5, 0.0)
        t, scale = torch.full((4,), 0.5), torch.tensor([1.0, 2.0, 2.0, 0.0])
        found = Guided(denoiser, negative, scale)(NOISE, t, captions)
        # the clean image is x - t (0.3 x + told t), linear in what the network is told
        beyond = negative.tokens.flatten() + scale * (captions.tokens - negative.tokens).flatten()
        assert torch.allclose(found, denoiser(NOISE, t, told(*beyond.tolist())), atol=1e-6)

    def test_guidance_keeps_the_time_of_each_row(self) -> None:
        guided = Guided(RectifiedFlow().denoiser(Told()), told(0, 0, 0, 0), torch.full((4,), 3.0))
        t = torch.tensor([1.0, 0.7, 0.3, 0.1])
        captions = told(0.0, 0.5, -0.5, 1.0)
        together = guided(NOISE, t, captions)
        for row in range(4):
            one = slice(row, row + 1)
            alone = Guided(guided.denoiser, guided.negative.rows(one), guided.scale[one])
            assert torch.allclose(alone(NOISE[one], t[one], captions.rows(one)), together[one], atol=1e-6)

    @pytest.mark.parametrize("steps", [1, 4, 20])
    @pytest.mark.parametrize("shift", [1.0, 3.0])
    def test_diffusers_scheduler_makes_the_same_pictures(self, unet: torch.nn.Module, steps: int, shift: float) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        noise = torch.stack([normal(1, row, "sample", shape=(3, 8, 8)) for row in range(2)])
        captions = Conditioning(normal(1, "captions", shape=(2, 5, 12)), torch.ones(2, 5, dtype=torch.bool))

        def network(x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
            return apply(unet, x, t, conditioning)

        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps))
        assert torch.allclose(scheduler.sigmas, times(steps, shift), atol=1e-6)
        x = noise
        with torch.no_grad():
            for at in scheduler.timesteps:
                x = scheduler.step(network(x, (at / 1000).expand(2), captions), at, x).prev_sample
        ours = sample(RectifiedFlow().denoiser(network), noise, captions, times(steps, shift))
        assert float((ours - noise).abs().max()) > 0.1, "something happened"
        assert torch.allclose(ours, x, atol=2e-5, rtol=1e-5)
