"""Rectified flow: straight paths from noise to images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from training.objectives.base import Objective
from training.objectives.contract import Denoiser, Draws, Network, per_row

if TYPE_CHECKING:
    import numpy as np
    import torch

    from training.conditioning import Conditioning


@dataclass(frozen=True)
class FlowDenoiser:
    """The denoiser of a network that predicts rectified flow's velocity, ``v = noise - clean``."""

    network: Network

    def __call__(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """``clean = x - t v``."""
        return x - per_row(t, x) * self.network(x, t, conditioning)

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """The share of the clean image at time ``t``."""
        return 1.0 - t

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The share of noise at time ``t``."""
        return t


class RectifiedFlow(Objective):
    """Rectified flow with logit-normal times.

    Straight paths: Liu et al. 2022, "Flow Straight and Fast", eq. 1. Times: Esser et al. 2024, "Scaling
    Rectified Flow Transformers", eq. 19 and the resolution shift of eq. 23. The network is told ``t``.
    """

    kind: Literal["rectified_flow"] = "rectified_flow"
    """Chooses this objective."""
    logit_mean: float = 0.0
    """Mean of logit(t); above 0 trains more on noise."""
    logit_std: float = Field(default=1.0, gt=0)
    """Standard deviation of logit(t)."""
    time_shift: float = Field(default=1.0, gt=0)
    """Resolution shift of t; 1 leaves it, 3 suits 1024 px latents."""

    def loss(self, network: Network, clean: torch.Tensor, conditioning: Conditioning, draws: Draws) -> torch.Tensor:
        """Mean squared error of the velocity, per row ``[B]`` (Liu et al. 2022, eq. 1).

        Args:
            network: the raw network.
            clean: ``[B,C,H,W]`` images in -1..1, or latents.
            conditioning: what the network is told, dropped captions already replaced.
            draws: the batch's random numbers.
        """
        errors = self.velocity_loss(network, clean, conditioning, draws)
        return self._weighted(errors, draws.t, draws.t / (1 - draws.t))

    def velocity_loss(
        self, network: Network, clean: torch.Tensor, conditioning: Conditioning, draws: Draws
    ) -> torch.Tensor:
        """The network's own error, per row ``[B]``: it predicts what objectives are compared by."""
        t = per_row(draws.t, clean)
        x = (1 - t) * clean + t * draws.noise
        velocity = network(x, draws.t, conditioning).float()
        return (velocity - (draws.noise - clean)).square().flatten(1).mean(1)

    def denoiser(self, network: Network) -> Denoiser:
        """The denoiser that samplers and serving see."""
        return FlowDenoiser(network)

    def grid(self, steps: int) -> torch.Tensor:
        """``[steps + 1]`` times from 1 to 0, evenly spaced and then shifted (Esser et al. 2024, eq. 23)."""
        from training.samplers.grids import times

        return times(steps, self.time_shift)

    def scheduler(self) -> Any:
        """Euler's method on ``grid``'s times, given ``set_timesteps(sigmas=linspace(1, 1 / steps, steps))``."""
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(shift=self.time_shift)

    def _level(self, draw: np.random.Generator) -> float:
        return float(self.logit_mean + self.logit_std * draw.standard_normal())

    def _times(self, levels: torch.Tensor) -> torch.Tensor:
        t = levels.sigmoid()
        return self.time_shift * t / (1 + (self.time_shift - 1) * t)

    def _time_at(self, ratio: torch.Tensor) -> torch.Tensor:
        return ratio / (1 + ratio)
