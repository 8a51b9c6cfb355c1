"""Guidance beyond the classifier-free: intervals, weaker models and the spread of what comes out."""

from __future__ import annotations

import pytest
import torch

from training import noise
from training.conditioning import Conditioning
from training.objectives import Denoiser, Edm, Epsilon, ObjectiveConfig, RectifiedFlow, VPrediction, per_row
from training.samplers import Guided, rescaled, sample

ROWS = 4
X = torch.stack([noise.normal(0, row, "x", shape=(3, 4, 4)) for row in range(ROWS)])
T = torch.tensor([0.9, 0.6, 0.4, 0.1])
KINDS = {"rectified_flow": RectifiedFlow(), "v": VPrediction(), "epsilon": Epsilon(), "edm": Edm()}


def told(*values: float) -> Conditioning:
    """One caption of one token per value."""
    return Conditioning(torch.tensor(values).reshape(-1, 1, 1), torch.ones(len(values), 1, dtype=torch.bool))


def network(x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    return torch.sin(2 * x + per_row(t, x)) + conditioning.tokens.reshape(-1, 1, 1, 1) * torch.cos(3 * x)


def weak(x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    return 0.5 * network(x, t, conditioning)


CAPTIONS, NEGATIVE = told(0.5, 1.0, -0.5, 2.0), told(0.0, 0.0, 0.1, 0.0)
SCALE = torch.tensor([1.0, 2.0, 3.0, 7.0])


def test_only_rows_inside_the_interval_are_guided() -> None:
    denoiser = RectifiedFlow().denoiser(network)
    plain = denoiser(X, T, CAPTIONS)
    guided = Guided(denoiser, NEGATIVE, SCALE)(X, T, CAPTIONS)
    some = Guided(denoiser, NEGATIVE, SCALE, interval=(0.5, 2.0))(X, T, CAPTIONS)
    # noise over image is 9, 1.5, 0.67 and 0.11
    assert torch.allclose(some[[0, 3]], plain[[0, 3]], atol=1e-5)
    assert torch.equal(some[[1, 2]], guided[[1, 2]])
    assert not torch.allclose(guided[3], plain[3], atol=1e-2)


def test_the_interval_is_of_the_same_noise_whatever_the_objective() -> None:
    for objective in KINDS.values():
        denoiser = objective.denoiser(network)
        levels = denoiser.sigma(T) / denoiser.alpha(T)
        alone = Guided(denoiser, NEGATIVE, SCALE, interval=(0.0, float(levels[2])))(X, T, CAPTIONS)
        plain, guided = denoiser(X, T, CAPTIONS), Guided(denoiser, NEGATIVE, SCALE)(X, T, CAPTIONS)
        assert torch.allclose(alone[:2], plain[:2], atol=1e-4, rtol=1e-4)
        assert torch.equal(alone[2:], guided[2:])


def test_autoguidance_leads_away_from_the_weaker_model_with_the_same_caption() -> None:
    objective = RectifiedFlow()
    strong, guide = objective.denoiser(network), objective.denoiser(weak)
    found = Guided(strong, CAPTIONS, SCALE, guide=guide)(X, T, CAPTIONS)
    good, bad = strong(X, T, CAPTIONS), guide(X, T, CAPTIONS)
    assert torch.allclose(found, bad + SCALE.reshape(-1, 1, 1, 1) * (good - bad), atol=1e-6)
    assert torch.allclose(found[0], good[0], atol=1e-6), "a scale of 1 is the model alone"
    itself = Guided(strong, CAPTIONS, SCALE, guide=strong)(X, T, CAPTIONS)
    assert torch.allclose(itself, good, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_rescaling_gives_v_its_unguided_spread(name: str) -> None:
    objective: ObjectiveConfig = KINDS[name]
    denoiser = objective.denoiser(network)

    def v(clean: torch.Tensor) -> torch.Tensor:
        alpha, sigma = per_row(denoiser.alpha(T), X), per_row(denoiser.sigma(T), X)
        norm = (alpha**2 + sigma**2).sqrt()
        return (alpha / norm * (X / norm) - clean) / (sigma / norm)

    plain = denoiser(X, T, CAPTIONS)
    guided = Guided(denoiser, NEGATIVE, SCALE)(X, T, CAPTIONS)
    whole = Guided(denoiser, NEGATIVE, SCALE, rescale=1.0)(X, T, CAPTIONS)
    assert torch.allclose(v(whole).flatten(1).std(1), v(plain).flatten(1).std(1), rtol=1e-3)
    assert float(v(guided)[3].std()) > 1.5 * float(v(plain)[3].std())
    half = Guided(denoiser, NEGATIVE, SCALE, rescale=0.5)(X, T, CAPTIONS)
    assert torch.allclose(half, (whole + guided) / 2, atol=1e-4, rtol=1e-4)
    assert torch.allclose(rescaled(denoiser, X, T, guided, plain, 0.0), guided, atol=1e-4, rtol=1e-4)


def test_rescaling_is_diffusers_on_a_v_prediction() -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    objective = VPrediction()
    positive, negative = (network(X, T - 0.001, told) for told in (CAPTIONS, NEGATIVE))
    guided = negative + SCALE.reshape(-1, 1, 1, 1) * (positive - negative)
    wanted = rescale_noise_cfg(guided, positive, guidance_rescale=0.7)
    denoiser = objective.denoiser(network)
    found = Guided(denoiser, NEGATIVE, SCALE, rescale=0.7)(X, T, CAPTIONS)
    alpha, sigma = per_row(denoiser.alpha(T), X), per_row(denoiser.sigma(T), X)
    assert torch.allclose(found, alpha * X - sigma * wanted, atol=1e-4)


def test_all_of_it_together_keeps_rows_apart() -> None:
    objective = VPrediction()
    strong, guide = objective.denoiser(network), objective.denoiser(weak)

    def made(rows: slice) -> torch.Tensor:
        told = CAPTIONS.rows(rows)
        guided = Guided(strong, told, SCALE[rows], guide=guide, interval=(0.1, 5.0), rescale=0.7)
        return sample(guided, X[rows], told, objective.grid(6), sampler="heun")

    together = made(slice(0, ROWS))
    assert bool(together.isfinite().all())
    for row in range(ROWS):
        assert torch.allclose(made(slice(row, row + 1))[0], together[row], atol=1e-5, rtol=1e-5)


def test_a_guided_denoiser_is_a_denoiser() -> None:
    inner: Denoiser = VPrediction().denoiser(network)
    guided = Guided(Guided(inner, NEGATIVE, SCALE), CAPTIONS, torch.ones(ROWS), guide=inner)
    assert torch.equal(guided.alpha(T), inner.alpha(T))
    assert torch.equal(guided.sigma(T), inner.sigma(T))
    assert torch.allclose(guided(X, T, CAPTIONS), Guided(inner, NEGATIVE, SCALE)(X, T, CAPTIONS), atol=1e-5)
