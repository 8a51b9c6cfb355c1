"""How each sampler moves, given what the denoiser predicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from training import noise
from training.objectives import Denoiser, per_row
from training.samplers.trajectory import Trajectory
from training.sampling_config import SAMPLERS, SamplerName


def advance(denoiser: Denoiser, trajectories: Sequence[Trajectory], clean: torch.Tensor) -> None:
    """Move every trajectory by one evaluation.

    Args:
        denoiser: gives alpha and sigma.
        trajectories: unfinished ones, each with a sampler, a time and a length of its own.
        clean: ``[B,C,H,W]`` what the denoiser predicts at their ``x`` and ``t``, guidance included.
    """
    for name in SAMPLERS:
        places = [place for place, trajectory in enumerate(trajectories) if trajectory.sampler == name]
        if places:
            _MOVES[name](denoiser, [trajectories[place] for place in places], clean[places])


_LEAST_ALPHA = 0.005
"""At time 1; Stable Diffusion's schedule has 0.07, EDM's 0.0125, DDPM's 0.006, the cosine one 0.00005."""


def euler_step(
    denoiser: Denoiser, x: torch.Tensor, clean: torch.Tensor, t: torch.Tensor, t_next: torch.Tensor
) -> torch.Tensor:
    """Move rows from ``t`` to ``t_next`` along the line through the predicted clean image.

    For rectified flow this is Euler's method; in general it is DDIM (Song et al. 2021, eq. 12 with sigma = 0).

    Args:
        denoiser: gives alpha and sigma.
        x: ``[B,C,H,W]`` noisy images at ``t``.
        clean: ``[B,C,H,W]`` what the denoiser predicts for them.
        t: ``[B]`` current times, above 0.
        t_next: ``[B]`` times to move to; 0 ends.
    """
    epsilon = (x - per_row(denoiser.alpha(t), x) * clean) / per_row(denoiser.sigma(t), x)
    return per_row(denoiser.alpha(t_next), x) * clean + per_row(denoiser.sigma(t_next), x) * epsilon


def _now(trajectories: Sequence[Trajectory]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stacked ``x``, and the times at both ends of the current step."""
    x = torch.stack([each.x for each in trajectories])
    t = torch.stack([each.times[each.step] for each in trajectories])
    return x, t, torch.stack([each.times[each.step + 1] for each in trajectories])


def _arrive(trajectories: Sequence[Trajectory], x: torch.Tensor) -> None:
    """A step is done."""
    for each, row in zip(trajectories, x, strict=True):
        each.x = row
        each.step += 1


def _euler(denoiser: Denoiser, trajectories: Sequence[Trajectory], clean: torch.Tensor) -> None:
    x, t, t_next = _now(trajectories)
    _arrive(trajectories, euler_step(denoiser, x, clean, t, t_next))


def _heun(denoiser: Denoiser, trajectories: Sequence[Trajectory], clean: torch.Tensor) -> None:
    """Karras et al. 2022, algorithm 1 without churn: Euler's step, then again with the mean of both ends' slopes.

    The slope is that of ``x / scale`` over ``sigma / scale``.
    """
    x, t, t_next = _now(trajectories)
    second = [place for place, each in enumerate(trajectories) if each.memory]
    first = [place for place, each in enumerate(trajectories) if not each.memory]
    if second:
        corrected = [trajectories[place] for place in second]
        start, slope = (torch.stack([each.memory[part] for each in corrected]) for part in (0, 1))
        mean = (slope + _slope(denoiser, x[second], clean[second], t_next[second])) / 2
        at, then = _level(denoiser, t[second]), _level(denoiser, t_next[second])
        moved = start + per_row(then - at, x) * mean
        for each in corrected:
            each.memory = ()
        _arrive(corrected, moved * per_row(_scale(denoiser, t_next[second]), x))
    if first:
        x, clean, t, t_next = x[first], clean[first], t[first], t_next[first]
        predicted = euler_step(denoiser, x, clean, t, t_next)
        start, slope = x / per_row(_scale(denoiser, t), x), _slope(denoiser, x, clean, t)
        for row, place in enumerate(first):
            each = trajectories[place]
            each.x = predicted[row]
            if float(t_next[row]) > 0:  # there is no slope at 0: the last step is Euler's
                each.memory = (start[row], slope[row])
            else:
                each.step += 1


def _scale(denoiser: Denoiser, t: torch.Tensor) -> torch.Tensor:
    """What Heun's method divides by: alpha, so that an image keeps its size and noise is added (Karras et al. 2022).

    Where a schedule ends in pure noise, or nearly, one step of it would be longer than all others: then alpha + sigma,
    in which every Gaussian path is rectified flow's.
    """
    alpha = denoiser.alpha(t)
    ends_in_noise = denoiser.alpha(torch.ones_like(t)) < _LEAST_ALPHA
    return torch.where(ends_in_noise, alpha + denoiser.sigma(t), alpha)


def _level(denoiser: Denoiser, t: torch.Tensor) -> torch.Tensor:
    return denoiser.sigma(t) / _scale(denoiser, t)


def _slope(denoiser: Denoiser, x: torch.Tensor, clean: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return (x / per_row(_scale(denoiser, t), x) - clean) / per_row(_level(denoiser, t), x)


def _dpmpp_2m(denoiser: Denoiser, trajectories: Sequence[Trajectory], clean: torch.Tensor) -> None:
    """Lu et al. 2022, "DPM-Solver++", algorithm 2: the clean image extrapolated from this prediction and the last.

    ``exp(-h) = alpha(t) sigma(t') / (alpha(t') sigma(t))`` is written without logarithms, which are infinite at the
    ends; first order at both.
    """
    x, t, t_next = _now(trajectories)
    mixed = clean.clone()
    for row, each in enumerate(trajectories):
        if each.memory and float(t_next[row]) > 0:
            h_last = float(_half_log_snr(denoiser, t[row]) - _half_log_snr(denoiser, each.times[each.step - 1]))
            h = float(_half_log_snr(denoiser, t_next[row]) - _half_log_snr(denoiser, t[row]))
            weight = h / (2 * h_last)
            mixed[row] = (1 + weight) * clean[row] - weight * each.memory[0]
        each.memory = (clean[row],)
    decay = denoiser.alpha(t) * denoiser.sigma(t_next) / (denoiser.alpha(t_next) * denoiser.sigma(t))
    kept = per_row(denoiser.sigma(t_next) / denoiser.sigma(t), x)
    _arrive(trajectories, kept * x + per_row(denoiser.alpha(t_next) * (1 - decay), x) * mixed)


def _half_log_snr(denoiser: Denoiser, t: torch.Tensor) -> torch.Tensor:
    return torch.log(denoiser.alpha(t)) - torch.log(denoiser.sigma(t))


def _ancestral(denoiser: Denoiser, trajectories: Sequence[Trajectory], clean: torch.Tensor) -> None:
    """Song et al. 2021, "DDIM", eq. 12 and 16: part of the noise is drawn anew, with eta 1 as much as by DDPM."""
    x, t, t_next = _now(trajectories)
    epsilon = (x - per_row(denoiser.alpha(t), x) * clean) / per_row(denoiser.sigma(t), x)
    shape = tuple(x.shape[1:])
    fresh = torch.stack([noise.normal(each.seed, "ancestral", each.step, shape=shape) for each in trajectories])
    eta = torch.tensor([each.eta for each in trajectories], device=x.device)
    old = denoiser.sigma(t_next) * denoiser.alpha(t) / (denoiser.alpha(t_next) * denoiser.sigma(t))
    new = eta * (1 - old.square()).clamp(min=0).sqrt()
    kept = denoiser.sigma(t_next) * torch.where(eta == 1, old, (1 - new.square()).sqrt())
    drawn = denoiser.sigma(t_next) * new
    moved = per_row(denoiser.alpha(t_next), x) * clean + per_row(kept, x) * epsilon
    _arrive(trajectories, moved + per_row(drawn, x) * fresh.to(x))


def _lcm(denoiser: Denoiser, trajectories: Sequence[Trajectory], clean: torch.Tensor) -> None:
    """Song et al. 2023, "Consistency Models", algorithm 1, as Luo et al. 2023, "LCM", have it: all noise is drawn anew.

    ``x' = alpha(t') clean + sigma(t') fresh``: for a network that was distilled to predict in a step or a few.
    """
    x, _, t_next = _now(trajectories)
    shape = tuple(x.shape[1:])
    fresh = torch.stack([noise.normal(each.seed, "lcm", each.step, shape=shape) for each in trajectories])
    moved = per_row(denoiser.alpha(t_next), x) * clean
    _arrive(trajectories, moved + per_row(denoiser.sigma(t_next), x) * fresh.to(x))


_MOVES: dict[SamplerName, Callable[[Denoiser, Sequence[Trajectory], torch.Tensor], None]] = {
    "euler": _euler,
    "heun": _heun,
    "dpmpp_2m": _dpmpp_2m,
    "ancestral": _ancestral,
    "lcm": _lcm,
}
