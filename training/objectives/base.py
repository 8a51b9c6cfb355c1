"""What all objectives have in common: how they are drawn, weighted and measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from training.objectives.contract import Denoiser, Draws, Network, per_row

if TYPE_CHECKING:
    import numpy as np
    import torch

    from training.conditioning import Conditioning


class Objective(BaseModel, ABC):
    """How a network is trained and how it becomes a denoiser."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    caption_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of samples trained without their caption, for classifier-free guidance."""
    offset_noise: float = Field(default=0.0, ge=0, le=1)
    """Standard deviation of a noise that is the same over each channel of an image, added to the noise (Guttenberg
    2023, "Diffusion with Offset Noise"); 0.1 lets a model make very dark and very light pictures."""
    min_snr_gamma: float | None = Field(default=None, gt=0)
    """Weighs the clean image's error by min(SNR, gamma) (Hang et al. 2023, section 3.4); 5 is usual. None weighs
    the network's own error evenly."""

    def draw(self, seed: int, epochs: list[int], sample_ids: list[int], shape: tuple[int, ...]) -> Draws:
        """The random numbers of these samples, each a function of ``(seed, epoch, sample id)`` alone.

        Args:
            seed: the run's seed.
            epochs: the epoch of each sample.
            sample_ids: the id of each sample.
            shape: the shape of one image, ``(C, H, W)``.
        """
        import torch  # late: a recipe is read and checked without torch

        from training import noise

        levels, noises, keeps = [], [], []
        for epoch, sample_id in zip(epochs, sample_ids, strict=True):
            draw = noise.generator(seed, epoch, sample_id, "train")
            levels.append(self._level(draw))
            keeps.append(draw.random() >= self.caption_dropout)
            drawn = draw.standard_normal(shape, dtype="float32")
            if self.offset_noise:
                drawn += self.offset_noise * draw.standard_normal((shape[0], 1, 1), dtype="float32")
            noises.append(torch.from_numpy(drawn))
        t = self._times(torch.tensor(levels, dtype=torch.float32))
        return Draws(t, torch.stack(noises), torch.tensor(keeps))

    @abstractmethod
    def loss(self, network: Network, clean: torch.Tensor, conditioning: Conditioning, draws: Draws) -> torch.Tensor:
        """What training minimises, per row ``[B]``.

        Args:
            network: the raw network.
            clean: ``[B,C,H,W]`` images in -1..1, or latents.
            conditioning: what the network is told, dropped captions already replaced.
            draws: the batch's random numbers.
        """

    @abstractmethod
    def denoiser(self, network: Network) -> Denoiser:
        """The denoiser that samplers and serving see."""

    @abstractmethod
    def grid(self, steps: int) -> torch.Tensor:
        """``[steps + 1]`` times from 1 to 0: where a sampler of that many steps asks the denoiser."""

    @abstractmethod
    def scheduler(self) -> Any:
        """The diffusers scheduler with which a pipeline samples this network: Euler's method on ``grid``'s times."""

    def velocity_loss(
        self, network: Network, clean: torch.Tensor, conditioning: Conditioning, draws: Draws
    ) -> torch.Tensor:
        """The network's error in a space that all objectives share, per row ``[B]``; unweighted.

        It is the mean squared error of rectified flow's velocity, ``noise - clean``, where ``draws.t`` is rectified
        flow's time: the denoiser is asked at the same ratio of noise to image, and an error of the clean image is one
        of the velocity times ``t``. A schedule that does not reach pure noise is asked at its own end beyond it, as
        in sampling.

        Args:
            network: the raw network.
            clean: ``[B,C,H,W]`` images in -1..1, or latents.
            conditioning: what the network is told.
            draws: rectified flow's times and the noises.
        """
        flow_time = draws.t.clamp(min=_LEAST_TIME)
        t = per_row(flow_time, clean)
        norm = ((1 - t).square() + t.square()).sqrt()
        x = ((1 - t) * clean + t * draws.noise) / norm
        predicted = self.denoiser(network)(x, self._time_at(flow_time / (1 - flow_time)), conditioning).float()
        return ((predicted - clean) / t).square().flatten(1).mean(1)

    @abstractmethod
    def _level(self, draw: np.random.Generator) -> float:
        """The one number behind a row's time."""

    @abstractmethod
    def _times(self, levels: torch.Tensor) -> torch.Tensor:
        """``[B]`` times of float32 levels."""

    @abstractmethod
    def _time_at(self, ratio: torch.Tensor) -> torch.Tensor:
        """``[B]`` times at which sigma / alpha is ``ratio``; at most 1."""

    def _weighted(self, errors: torch.Tensor, gain: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
        """Errors of the network's output weighed as ``min_snr_gamma`` says.

        The weight of the clean image's squared error is min(SNR, gamma); that of the output's is ``gain`` squared
        times as much (Hang et al. 2023, section 3.4, gives it for epsilon and v).

        Args:
            errors: ``[B]`` mean squared errors of the output.
            gain: ``[B]`` the clean image's error for each unit of the output's.
            ratio: ``[B]`` sigma / alpha, whose inverse square is the SNR.
        """
        if self.min_snr_gamma is None:
            return errors
        snr = ratio.reciprocal().square()
        return errors * gain.square() * snr.clamp(max=self.min_snr_gamma)


_LEAST_TIME = 1e-4
"""Nearer to the image, float32 holds too little of the noise for its error to be measured."""
