"""Whole pictures from noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from training.conditioning import Conditioning
from training.errors import UsageError
from training.objectives import Denoiser
from training.samplers.moves import advance
from training.samplers.trajectory import Trajectory
from training.sampling_config import STOCHASTIC, SamplerName


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    start: torch.Tensor,
    conditioning: Conditioning,
    grid: torch.Tensor,
    *,
    sampler: SamplerName = "euler",
    seeds: Sequence[int] = (),
    eta: float = 1.0,
) -> torch.Tensor:
    """What the network draws: pictures around -1..1 and not clipped, or latents.

    Args:
        denoiser: predicts clean images.
        start: ``[B,C,H,W]`` noise.
        conditioning: a row per image.
        grid: ``[steps + 1]`` times, such as ``times`` gives.
        sampler: how to get from one time to the next.
        seeds: key the noise that is added on the way, one per image; only ``ancestral`` and ``lcm`` add any.
        eta: the share of its noise that ``ancestral`` draws anew.

    Raises:
        UsageError: a sampler that draws noise without a seed per image.
    """
    if sampler in STOCHASTIC and len(seeds) != len(start):
        raise UsageError(
            f"The {sampler} sampler draws noise.", value=len(seeds), rule=f"{len(start)} seeds, one per image"
        )
    keys = seeds or [0] * len(start)
    rows = [Trajectory(x, grid.to(start.device), sampler, seed, eta) for x, seed in zip(start, keys, strict=True)]
    while not rows[0].finished:
        x, t = torch.stack([row.x for row in rows]), torch.stack([row.t for row in rows])
        advance(denoiser, rows, denoiser(x, t, conditioning))
    return torch.stack([row.x for row in rows])
