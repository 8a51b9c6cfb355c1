"""Samplers over the denoiser contract.

A sampler is what a trajectory does with the clean image that the denoiser predicts for it: one evaluation in, one
move out. Trajectories at different times, of different lengths and of different samplers share a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from training import noise
from training.conditioning import Conditioning
from training.errors import UsageError
from training.objectives import Denoiser, per_row
from training.sampling_config import SAMPLERS, SamplerName


def times(steps: int, shift: float = 1.0) -> torch.Tensor:
    """``[steps + 1]`` times from 1 to 0, evenly spaced and then shifted (Esser et al. 2024, eq. 23)."""
    even = torch.linspace(1.0, 0.0, steps + 1)
    return shift * even / (1 + (shift - 1) * even)


@dataclass(eq=False)
class Trajectory:
    """One image on its way from noise to picture.

    Attributes:
        x: ``[C,H,W]`` the image where the denoiser is asked next.
        times: ``[steps + 1]`` falling to 0.
        sampler: how it moves.
        seed: keys the noise that a sampler adds on the way.
        step: whole steps taken.
        memory: what the sampler keeps from one evaluation to the next.
    """

    x: torch.Tensor
    times: torch.Tensor
    sampler: SamplerName = "euler"
    seed: int = 0
    step: int = 0
    memory: tuple[torch.Tensor, ...] = field(default=(), repr=False)

    @property
    def steps(self) -> int:
        """Steps in all."""
        return len(self.times) - 1

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.step >= self.steps

    @property
    def evaluations_left(self) -> int:
        """How often the denoiser is still asked; Heun's last step is one of Euler's."""
        left = self.steps - self.step
        return 2 * left - 1 - len(self.memory) // 2 if self.sampler == "heun" else left

    @property
    def t(self) -> torch.Tensor:
        """``[]`` the time of ``x``."""
        corrects = self.sampler == "heun" and self.memory
        return self.times[self.step + 1 if corrects else self.step]


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

    The slope is that of ``x / (alpha + sigma)`` over ``sigma / (alpha + sigma)``: in these coordinates every Gaussian
    path is rectified flow's, which is finite at both ends.
    """
    x, t, t_next = _now(trajectories)
    second = [place for place, each in enumerate(trajectories) if each.memory]
    first = [place for place, each in enumerate(trajectories) if not each.memory]
    if second:
        corrected = [trajectories[place] for place in second]
        start, slope = (torch.stack([each.memory[part] for each in corrected]) for part in (0, 1))
        mean = (slope + _slope(denoiser, x[second], clean[second], t_next[second])) / 2
        at, then = _flow_time(denoiser, t[second]), _flow_time(denoiser, t_next[second])
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
    return denoiser.alpha(t) + denoiser.sigma(t)


def _flow_time(denoiser: Denoiser, t: torch.Tensor) -> torch.Tensor:
    return denoiser.sigma(t) / _scale(denoiser, t)


def _slope(denoiser: Denoiser, x: torch.Tensor, clean: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return (x / per_row(_scale(denoiser, t), x) - clean) / per_row(_flow_time(denoiser, t), x)


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
    """Song et al. 2021, "DDIM", eq. 12 with eta = 1, which is DDPM's sampler: part of the noise is drawn anew."""
    x, t, t_next = _now(trajectories)
    epsilon = (x - per_row(denoiser.alpha(t), x) * clean) / per_row(denoiser.sigma(t), x)
    shape = tuple(x.shape[1:])
    fresh = torch.stack([noise.normal(each.seed, "ancestral", each.step, shape=shape) for each in trajectories])
    old = denoiser.sigma(t_next) * denoiser.alpha(t) / (denoiser.alpha(t_next) * denoiser.sigma(t))
    kept = denoiser.sigma(t_next) * old
    drawn = denoiser.sigma(t_next) * (1 - old.square()).clamp(min=0).sqrt()
    moved = per_row(denoiser.alpha(t_next), x) * clean + per_row(kept, x) * epsilon
    _arrive(trajectories, moved + per_row(drawn, x) * fresh.to(x))


_MOVES: dict[SamplerName, Callable[[Denoiser, Sequence[Trajectory], torch.Tensor], None]] = {
    "euler": _euler,
    "heun": _heun,
    "dpmpp_2m": _dpmpp_2m,
    "ancestral": _ancestral,
}


@dataclass(frozen=True)
class Guided:
    """Classifier-free guidance (Ho and Salimans 2022, eq. 6) over a batch of twins.

    One call of the network carries each row and its unconditional (or negative) twin.
    """

    denoiser: Denoiser
    negative: Conditioning
    """One row per image."""
    scale: torch.Tensor
    """``[B]``; 1 is unguided."""

    def __call__(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Predict the clean images, guided."""
        both = self.denoiser(torch.cat([x, x]), torch.cat([t, t]), Conditioning.cat([conditioning, self.negative]))
        positive, negative = both.chunk(2)
        return negative + per_row(self.scale, x) * (positive - negative)

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """The share of the clean image at time ``t``."""
        return self.denoiser.alpha(t)

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The share of noise at time ``t``."""
        return self.denoiser.sigma(t)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    start: torch.Tensor,
    conditioning: Conditioning,
    grid: torch.Tensor,
    *,
    sampler: SamplerName = "euler",
    seeds: Sequence[int] = (),
) -> torch.Tensor:
    """Images in -1..1.

    Args:
        denoiser: predicts clean images.
        start: ``[B,C,H,W]`` noise.
        conditioning: a row per image.
        grid: ``[steps + 1]`` times, such as ``times`` gives.
        sampler: how to get from one time to the next.
        seeds: key the noise that is added on the way, one per image; only ``ancestral`` adds any.

    Raises:
        UsageError: ``ancestral`` without a seed per image.
    """
    if sampler == "ancestral" and len(seeds) != len(start):
        raise UsageError(
            "The ancestral sampler draws noise.", value=len(seeds), rule=f"{len(start)} seeds, one per image"
        )
    keys = seeds or [0] * len(start)
    rows = [Trajectory(x, grid.to(start.device), sampler, seed) for x, seed in zip(start, keys, strict=True)]
    while not rows[0].finished:
        x, t = torch.stack([row.x for row in rows]), torch.stack([row.t for row in rows])
        advance(denoiser, rows, denoiser(x, t, conditioning))
    return torch.stack([row.x for row in rows]).clamp(-1, 1)
