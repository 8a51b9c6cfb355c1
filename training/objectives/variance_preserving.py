"""Variance-preserving diffusion on a noise schedule: networks that predict v, and networks that predict the noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from training.objectives.base import Objective
from training.objectives.contract import Denoiser, Draws, Network, per_row
from training.objectives.noise_schedule import STEPS, CosineNoise, LinearNoise, NoiseSchedule, NoiseScheduleConfig

if TYPE_CHECKING:
    import numpy as np
    import torch

    from training.conditioning import Conditioning

_LEAST_ALPHA = 0.005
"""Of epsilon's last step: the clean image is the output's error over alpha, and nothing of it is left below this."""


def network_time(t: torch.Tensor) -> torch.Tensor:
    """What the network is told at time ``t``: ``step / 1000`` where ``t`` is ``(step + 1) / 1000``.

    Pretrained networks of diffusers so see their own timesteps 0..999; between the steps there are fractions.
    """
    return ((t * STEPS - 1) / STEPS).clamp(min=0)


@dataclass(frozen=True)
class VDenoiser:
    """The denoiser of a network that predicts ``v = alpha noise - sigma clean``."""

    network: Network
    noise_schedule: NoiseSchedule

    def __call__(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """``clean = alpha x - sigma v``."""
        v = self.network(x, network_time(t), conditioning)
        return per_row(self.alpha(t), x) * x - per_row(self.sigma(t), x) * v

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """The share of the clean image at time ``t``."""
        return self.noise_schedule.alpha(t)

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The share of noise at time ``t``."""
        return self.noise_schedule.sigma(t)


@dataclass(frozen=True)
class EpsilonDenoiser(VDenoiser):
    """The denoiser of a network that predicts the noise."""

    def __call__(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """``clean = (x - sigma epsilon) / alpha``."""
        epsilon = self.network(x, network_time(t), conditioning)
        return (x - per_row(self.sigma(t), x) * epsilon) / per_row(self.alpha(t), x)


class VariancePreserving(Objective):
    """Diffusion on a noise schedule, with times even over its steps."""

    noise_schedule: NoiseScheduleConfig
    """How the share of the image falls with time."""
    prediction_type: ClassVar[str]
    """What diffusers calls the network's output."""

    def grid(self, steps: int) -> torch.Tensor:
        """``[steps + 1]`` times from 1 to 0, evenly spaced over the schedule's steps (Lin et al. 2023, "trailing").

        Up to 1000 steps they lie on the schedule's own, which a pretrained network knows.
        """
        import torch

        even = torch.linspace(STEPS, 0, steps + 1, dtype=torch.float64)
        return ((even.round() if steps <= STEPS else even) / STEPS).float()

    def scheduler(self) -> Any:
        """DPM-Solver++ of first order, which is DDIM, on ``grid``'s times, given ``set_timesteps(steps)``.

        diffusers' DDIM itself ends beside the image where the steps do not divide 1000.
        """
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        return DPMSolverMultistepScheduler(
            **self.noise_schedule.arguments(),
            prediction_type=self.prediction_type,
            timestep_spacing="trailing",
            solver_order=1,
        )

    def _level(self, draw: np.random.Generator) -> float:
        return draw.random()

    def _times(self, levels: torch.Tensor) -> torch.Tensor:
        return (1 + (STEPS - 1) * levels) / STEPS

    def _time_at(self, ratio: torch.Tensor) -> torch.Tensor:
        return self.noise_schedule.time_at(ratio)

    def _errors(
        self, network: Network, clean: torch.Tensor, conditioning: Conditioning, draws: Draws, target: torch.Tensor
    ) -> torch.Tensor:
        """``[B]`` mean squared errors of the network's output, where it should give ``target``."""
        alpha, sigma = self._shares(draws.t, clean)
        x = alpha * clean + sigma * draws.noise
        predicted = network(x, network_time(draws.t), conditioning).float()
        return (predicted - target).square().flatten(1).mean(1)

    def _shares(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Alpha and sigma, to multiply images with."""
        return per_row(self.noise_schedule.alpha(t), like), per_row(self.noise_schedule.sigma(t), like)


class VPrediction(VariancePreserving):
    """v-prediction (Salimans and Ho 2022, "Progressive Distillation", section 4): ``v = alpha noise - sigma clean``.

    It says something of the image at every time, pure noise included.
    """

    prediction_type: ClassVar[str] = "v_prediction"

    kind: Literal["v"] = "v"
    """Chooses this objective."""
    noise_schedule: NoiseScheduleConfig = CosineNoise()
    """How the share of the image falls with time."""

    def denoiser(self, network: Network) -> Denoiser:
        """The denoiser that samplers and serving see."""
        return VDenoiser(network, self.noise_schedule)

    def loss(self, network: Network, clean: torch.Tensor, conditioning: Conditioning, draws: Draws) -> torch.Tensor:
        """Mean squared error of v, per row ``[B]`` (Salimans and Ho 2022, eq. 10).

        Args:
            network: the raw network.
            clean: ``[B,C,H,W]`` images in -1..1, or latents.
            conditioning: what the network is told, dropped captions already replaced.
            draws: the batch's random numbers.
        """
        alpha, sigma = self._shares(draws.t, clean)
        target = alpha * draws.noise - sigma * clean
        errors = self._errors(network, clean, conditioning, draws, target)
        schedule = self.noise_schedule
        return self._weighted(errors, schedule.sigma(draws.t), schedule.ratio(draws.t))


class Epsilon(VariancePreserving):
    """Noise prediction (Ho et al. 2020, "Denoising Diffusion Probabilistic Models", eq. 14)."""

    prediction_type: ClassVar[str] = "epsilon"

    kind: Literal["epsilon"] = "epsilon"
    """Chooses this objective."""
    noise_schedule: NoiseScheduleConfig = LinearNoise()
    """How the share of the image falls with time; it must not reach pure noise."""

    @model_validator(mode="after")
    def _image_is_left(self) -> Epsilon:
        mend = "choose objective.kind v, or noise_schedule.kind linear or scaled_linear with zero_terminal_snr false"
        if self.noise_schedule.zero_terminal_snr:
            raise ValueError(
                "zero_terminal_snr does not go with epsilon: in pure noise the noise says nothing of the image"
                f" (Lin et al. 2023, section 3.2); {mend}"
            )
        if self.noise_schedule.terminal_alpha < _LEAST_ALPHA:
            raise ValueError(
                f"the noise schedule leaves {self.noise_schedule.terminal_alpha:.2g} of the image at its last step;"
                f" epsilon needs {_LEAST_ALPHA}, as its errors are divided by it; {mend}"
            )
        return self

    def denoiser(self, network: Network) -> Denoiser:
        """The denoiser that samplers and serving see."""
        return EpsilonDenoiser(network, self.noise_schedule)

    def loss(self, network: Network, clean: torch.Tensor, conditioning: Conditioning, draws: Draws) -> torch.Tensor:
        """Mean squared error of the noise, per row ``[B]`` (Ho et al. 2020, eq. 14).

        Args:
            network: the raw network.
            clean: ``[B,C,H,W]`` images in -1..1, or latents.
            conditioning: what the network is told, dropped captions already replaced.
            draws: the batch's random numbers.
        """
        errors = self._errors(network, clean, conditioning, draws, draws.noise)
        ratio = self.noise_schedule.ratio(draws.t)
        return self._weighted(errors, ratio, ratio)
