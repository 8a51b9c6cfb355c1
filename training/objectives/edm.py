"""EDM: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models" (their table 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from training.objectives.base import Objective
from training.objectives.contract import Denoiser, Draws, Network, per_row

if TYPE_CHECKING:
    import numpy as np
    import torch

    from training.conditioning import Conditioning

_RHO = 7.0
"""Karras et al. 2022, eq. 5."""


class Edm(Objective):
    """Denoising with EDM's preconditioning and log-normal noise levels.

    EDM adds noise of level ``s`` to the image and rescales nothing; here ``x`` is that divided by ``sqrt(1 + s^2)``,
    so that it is standard normal at time 1 as with every objective. Time is ``(s / sigma_max) ** (1 / 7)``. The network
    is told ``log(s) / 4``, which is 1000 times its network time.
    """

    kind: Literal["edm"] = "edm"
    """Chooses this objective."""
    sigma_data: float = Field(default=0.5, gt=0)
    """Standard deviation of the images; 0.5 of pixels in -1..1, about 1 of whitened latents."""
    sigma_min: float = Field(default=0.002, gt=0)
    """The lowest noise level at which sampling asks the network."""
    sigma_max: float = Field(default=80.0, gt=0)
    """The highest noise level: where sampling starts, and training ends."""
    log_mean: float = -1.2
    """Mean of the noise level's logarithm in training."""
    log_std: float = Field(default=1.2, gt=0)
    """Standard deviation of the noise level's logarithm in training."""

    @model_validator(mode="after")
    def _levels_rise(self) -> Edm:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        return self

    def level(self, t: torch.Tensor) -> torch.Tensor:
        """``[B]`` noise levels at times, in EDM's own scale: noise over image."""
        return self.sigma_max * t**_RHO

    def loss(self, network: Network, clean: torch.Tensor, conditioning: Conditioning, draws: Draws) -> torch.Tensor:
        """Mean squared error of the raw network ``F``, per row ``[B]`` (Karras et al. 2022, eq. 8).

        The clean image's error is weighed by ``1 / c_out ** 2``, which makes it that of ``F`` and its variance 1.

        Args:
            network: the raw network.
            clean: ``[B,C,H,W]`` images in -1..1, or latents.
            conditioning: what the network is told, dropped captions already replaced.
            draws: the batch's random numbers.
        """
        level = self.level(draws.t)
        denoiser = EdmDenoiser(network, self)
        x = per_row(denoiser.alpha(draws.t), clean) * clean + per_row(denoiser.sigma(draws.t), clean) * draws.noise
        predicted = denoiser.raw(x, draws.t, conditioning).float()
        spread = (level.square() + self.sigma_data**2).sqrt()
        # (clean - c_skip x) / c_out, multiplied out: the difference would lose the image's share at low noise
        target = per_row(level / self.sigma_data / spread, clean) * clean
        target = target - per_row(self.sigma_data / spread, clean) * draws.noise
        errors = (predicted - target).square().flatten(1).mean(1)
        return self._weighted(errors, level * self.sigma_data / spread, level)

    def denoiser(self, network: Network) -> Denoiser:
        """The denoiser that samplers and serving see."""
        return EdmDenoiser(network, self)

    def grid(self, steps: int) -> torch.Tensor:
        """``[steps + 1]`` times: noise levels from sigma_max to sigma_min (Karras et al. 2022, eq. 5), then 0."""
        import torch

        lowest = (self.sigma_min / self.sigma_max) ** (1 / _RHO)
        return torch.cat([torch.linspace(1.0, lowest, steps), torch.zeros(1)])

    def scheduler(self) -> Any:
        """Euler's method on ``grid``'s times, given ``set_timesteps(steps)``.

        Its ``scale_model_input`` is the preconditioning's c_in and its timesteps are what the network is told; it
        starts at noise times its ``init_noise_sigma``.
        """
        from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler

        return EDMEulerScheduler(
            sigma_min=self.sigma_min, sigma_max=self.sigma_max, sigma_data=self.sigma_data, rho=_RHO
        )

    def _level(self, draw: np.random.Generator) -> float:
        return float(self.log_mean + self.log_std * draw.standard_normal())

    def _times(self, levels: torch.Tensor) -> torch.Tensor:
        return ((levels - math.log(self.sigma_max)) / _RHO).exp().clamp(max=1)

    def _time_at(self, ratio: torch.Tensor) -> torch.Tensor:
        return (ratio / self.sigma_max).pow(1 / _RHO).clamp(max=1)


@dataclass(frozen=True)
class EdmDenoiser:
    """The denoiser of a preconditioned network."""

    network: Network
    objective: Edm

    def __call__(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """``clean = c_skip x + c_out F(c_in x, log(level) / 4)`` (Karras et al. 2022, eq. 7)."""
        level, data = self.objective.level(t), self.objective.sigma_data
        variance = level.square() + data**2
        unscaled = per_row((1 + level.square()).sqrt(), x) * x
        output = per_row(level * data * variance.rsqrt(), x) * self.raw(x, t, conditioning)
        return per_row(data**2 / variance, x) * unscaled + output

    def raw(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """``F``: the network's output, its input brought to variance 1 by c_in."""
        level = self.objective.level(t)
        scale = ((1 + level.square()) / (level.square() + self.objective.sigma_data**2)).sqrt()
        return self.network(per_row(scale, x) * x, level.log() / 4000, conditioning)

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """The share of the clean image at time ``t``."""
        return (1 + self.objective.level(t).square()).rsqrt()

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The share of noise at time ``t``."""
        level = self.objective.level(t)
        return level * (1 + level.square()).rsqrt()
