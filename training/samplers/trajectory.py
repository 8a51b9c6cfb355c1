"""One image on its way from noise to picture."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from training.sampling_config import SamplerName


@dataclass(eq=False)
class Trajectory:
    """One image on its way from noise to picture.

    Attributes:
        x: ``[C,H,W]`` the image where the denoiser is asked next.
        times: ``[steps + 1]`` falling to 0.
        sampler: how it moves.
        seed: keys the noise that a sampler adds on the way.
        eta: the share of its noise that ``ancestral`` draws anew (Song et al. 2021, "DDIM", eq. 16): 1 is DDPM's, 0
            Euler's step.
        step: whole steps taken.
        memory: what the sampler keeps from one evaluation to the next.
    """

    x: torch.Tensor
    times: torch.Tensor
    sampler: SamplerName = "euler"
    seed: int = 0
    eta: float = 1.0
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
