"""Noise schedules of variance-preserving diffusion: diffusers' thousand steps, made continuous."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

STEPS = 1000
"""Steps of the discrete schedule; step ``i`` lies at time ``(i + 1) / STEPS``, so that time 0 is the image."""


class NoiseSchedule(BaseModel, ABC):
    """How the share of the image falls with time: diffusers' betas, and between its steps a line.

    ``alpha`` at time ``(i + 1) / 1000`` is the root of diffusers' ``alphas_cumprod[i]``; at 0 it is 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    zero_terminal_snr: bool = False
    """Rescales the schedule so that its last step is pure noise (Lin et al. 2023, algorithm 1)."""
    shift: float = Field(default=1.0, gt=0)
    """Multiplies sigma / alpha at every time: above 1 there is more noise, as large images need (Hoogeboom et al.
    2023, "Simple Diffusion", section 2.1: the ratio of the sides); what ``time_shift`` is to rectified flow."""

    @abstractmethod
    def plain_betas(self) -> NDArray[np.float64]:
        """``[1000]`` betas before any rescaling."""

    @abstractmethod
    def plain_arguments(self) -> dict[str, Any]:
        """What diffusers' schedulers call these betas."""

    @property
    def terminal_alpha(self) -> float:
        """The share of the image that is left at time 1."""
        return float(_alphas(self)[-1])

    def betas(self) -> NDArray[np.float64]:
        """``[1000]`` betas of the discrete schedule, shifted and rescaled."""
        bars = _alphas(self) ** 2
        return 1 - bars[1:] / bars[:-1]

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """The share of the image at times ``[B]`` in 0..1."""
        return self._exact_alpha(t).to(t.dtype)

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The share of noise at times ``[B]`` in 0..1: ``sqrt(1 - alpha ** 2)``."""
        alpha = self._exact_alpha(t)
        return ((1 - alpha) * (1 + alpha)).sqrt().to(t.dtype)

    def ratio(self, t: torch.Tensor) -> torch.Tensor:
        """Noise over image, sigma / alpha, at times ``[B]``; infinite where nothing of the image is left."""
        return self.sigma(t) / self.alpha(t)

    def time_at(self, ratio: torch.Tensor) -> torch.Tensor:
        """``[B]`` times at which sigma / alpha is ``ratio``; 1 where the schedule has no so large one."""
        import torch

        table = _table(self, ratio.device)
        wanted = (1 + ratio.double().square()).rsqrt().clamp(min=table[-1])
        after = torch.searchsorted(-table, -wanted).clamp(1, STEPS)
        low, high = table[after], table[after - 1]
        return ((after - (wanted - low) / (high - low)) / STEPS).to(ratio.dtype)

    def arguments(self) -> dict[str, Any]:
        """What diffusers' schedulers call this schedule."""
        betas = self.plain_arguments() if self.shift == 1 else {"trained_betas": self.betas().tolist()}
        return {**betas, "num_train_timesteps": STEPS, "rescale_betas_zero_snr": self.zero_terminal_snr}

    def _exact_alpha(self, t: torch.Tensor) -> torch.Tensor:
        """In float64: near the image, alpha is so near to 1 that float32 would lose sigma."""
        table = _table(self, t.device)
        place = t.double().clamp(0, 1) * STEPS
        before = place.floor().clamp(max=STEPS - 1)
        index = before.long()
        return table[index] + (place - before) * (table[index + 1] - table[index])


class CosineNoise(NoiseSchedule):
    """Nichol and Dhariwal 2021, "Improved DDPM", eq. 17: nearly even in the logarithm of the noise."""

    kind: Literal["cosine"] = "cosine"
    """Chooses this schedule."""

    def plain_betas(self) -> NDArray[np.float64]:
        """``[1000]`` betas, capped at 0.999."""
        import numpy as np

        bars = np.cos((np.arange(STEPS + 1) / STEPS + 0.008) / 1.008 * np.pi / 2) ** 2
        capped: NDArray[np.float64] = np.minimum(1 - bars[1:] / bars[:-1], 0.999)
        return capped

    def plain_arguments(self) -> dict[str, Any]:
        """The name."""
        return {"beta_schedule": "squaredcos_cap_v2"}


class LinearNoise(NoiseSchedule):
    """Betas that rise evenly (Ho et al. 2020), or evenly in their roots (Stable Diffusion, Rombach et al. 2022)."""

    kind: Literal["linear", "scaled_linear"] = "linear"
    """Chooses this schedule."""
    beta_start: float = Field(default=0.0001, gt=0, lt=1)
    """The first step's beta; Stable Diffusion has 0.00085."""
    beta_end: float = Field(default=0.02, gt=0, lt=1)
    """The last step's beta; Stable Diffusion has 0.012."""

    @model_validator(mode="after")
    def _rises(self) -> LinearNoise:
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start {self.beta_start} must be at most beta_end {self.beta_end}")
        return self

    def plain_betas(self) -> NDArray[np.float64]:
        """``[1000]`` betas."""
        import numpy as np

        power = 2 if self.kind == "scaled_linear" else 1
        return np.linspace(self.beta_start ** (1 / power), self.beta_end ** (1 / power), STEPS) ** power

    def plain_arguments(self) -> dict[str, Any]:
        """The name and its two numbers."""
        return {"beta_schedule": self.kind, "beta_start": self.beta_start, "beta_end": self.beta_end}


NoiseScheduleConfig = Annotated[CosineNoise | LinearNoise, Field(discriminator="kind")]
"""Every noise schedule; the union is the registry."""


@lru_cache(maxsize=64)
def _alphas(schedule: NoiseSchedule) -> NDArray[np.float64]:
    """``[1001]`` alpha at times 0, 1/1000, ..., 1."""
    import numpy as np

    alphas = np.sqrt(np.cumprod(1 - schedule.plain_betas()))
    if schedule.zero_terminal_snr:
        alphas = (alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))
    shifted = alphas / np.sqrt(alphas**2 + schedule.shift**2 * (1 - alphas**2))
    return np.concatenate([[1.0], shifted])


def _table(schedule: NoiseSchedule, device: torch.device) -> torch.Tensor:
    """Not kept: made among fake tensors, it would be of no use to real ones."""
    import torch

    return torch.from_numpy(_alphas(schedule)).to(device)
