"""Samplers over the denoiser contract.

Every sampler advances a batch whose rows may be at different times: ``t`` and ``t_next`` are vectors.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from training.conditioning import Conditioning
from training.objectives import Denoiser, per_row


def times(steps: int, shift: float = 1.0) -> torch.Tensor:
    """``[steps + 1]`` times from 1 to 0, evenly spaced and then shifted (Esser et al. 2024, eq. 23)."""
    even = torch.linspace(1.0, 0.0, steps + 1)
    return shift * even / (1 + (shift - 1) * even)


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
    denoiser: Denoiser, noise: torch.Tensor, conditioning: Conditioning, steps: int, shift: float = 1.0
) -> torch.Tensor:
    """Images in -1..1 from noise ``[B,C,H,W]``, with Euler's method."""
    x = noise
    grid = times(steps, shift)
    for now, then in itertools.pairwise(grid):
        t, t_next = now.expand(len(x)), then.expand(len(x))
        x = euler_step(denoiser, x, denoiser(x, t, conditioning), t, t_next)
    return x.clamp(-1, 1)
