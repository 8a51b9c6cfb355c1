"""Guidance: a denoiser made of a denoiser and of what it is to lead away from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from training.conditioning import Conditioning
from training.objectives import Denoiser, per_row


@dataclass(frozen=True)
class Guided:
    """Guidance over a batch: from a negative prediction through the positive one, and beyond.

    Classifier-free (Ho and Salimans 2022, eq. 6), one call of the network carries each row and its unconditional (or
    negative) twin. With a ``guide`` the negative prediction is that denoiser's: given the captions themselves as
    ``negative``, this is autoguidance (Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself",
    eq. 3).
    """

    denoiser: Denoiser
    negative: Conditioning
    """One row per image."""
    scale: torch.Tensor
    """``[B]``; 1 is unguided."""
    guide: Denoiser | None = None
    """A weaker model of the same objective, smaller or less trained."""
    interval: tuple[float, float] | None = None
    """The noise levels, sigma / alpha, above the first and up to the second of which rows are guided; None is all
    (Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval", eq. 6)."""
    rescale: float = 0.0
    """0..1, how far the guided prediction is brought to the spread of the unguided one; see ``rescaled``."""

    def __call__(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Predict the clean images, guided."""
        positive, negative = self._both(x, t, conditioning)
        scale = self.scale
        if self.interval is not None:
            low, high = self.interval
            alpha, sigma = self.alpha(t), self.sigma(t)
            inside = (sigma > low * alpha) & (sigma <= high * alpha)
            scale = torch.where(inside, scale, torch.ones_like(scale))
        guided = negative + per_row(scale, x) * (positive - negative)
        return rescaled(self.denoiser, x, t, guided, positive, self.rescale) if self.rescale else guided

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """The share of the clean image at time ``t``."""
        return self.denoiser.alpha(t)

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The share of noise at time ``t``."""
        return self.denoiser.sigma(t)

    def _both(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        """The positive and the negative prediction."""
        if self.guide is not None:
            return self.denoiser(x, t, conditioning), self.guide(x, t, self.negative)
        both = self.denoiser(torch.cat([x, x]), torch.cat([t, t]), Conditioning.cat([conditioning, self.negative]))
        positive, negative = both.chunk(2)
        return positive, negative


def rescaled(
    denoiser: Denoiser, x: torch.Tensor, t: torch.Tensor, guided: torch.Tensor, positive: torch.Tensor, share: float
) -> torch.Tensor:
    """Guided clean images whose v has the spread that it has without guidance (Lin et al. 2023, eq. 14 to 16).

    Strong guidance widens the prediction, and the picture is overexposed.

    Args:
        denoiser: gives alpha and sigma.
        x: ``[B,C,H,W]`` noisy images.
        t: ``[B]`` their times, above 0.
        guided: ``[B,C,H,W]`` clean images as guidance predicts them.
        positive: ``[B,C,H,W]`` clean images as predicted without guidance.
        share: 0 leaves ``guided`` as it is, 1 gives it the unguided spread, 0.7 is the paper's.
    """
    alpha, sigma = denoiser.alpha(t), denoiser.sigma(t)
    norm = (alpha.square() + sigma.square()).sqrt()
    # in variance-preserving coordinates, clean = alpha x - sigma v
    base = per_row(alpha / norm.square(), x) * x
    unit = per_row(sigma / norm, x)
    v, plain = (base - guided) / unit, (base - positive) / unit
    spread = plain.flatten(1).std(1) / v.flatten(1).std(1)
    return base - unit * v * per_row(1 + share * (spread - 1), x)
