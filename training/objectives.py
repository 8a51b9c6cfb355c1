"""Objectives: how a network is trained and how it becomes a denoiser.

Samplers, evaluation and serving see only the denoiser, so training and serving cannot disagree about scaling,
prediction type or timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch

    from training.conditioning import Conditioning


class Network(Protocol):
    """A network's raw prediction: ``(x [B,C,H,W], t [B] in 0..1, conditioning) -> [B,C,H,W]``."""

    def __call__(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Predict."""
        ...


class Denoiser(Protocol):
    """``(x [B,C,H,W], t [B], conditioning) -> predicted clean images [B,C,H,W]``.

    ``t`` is a vector, one time per row, 1 at pure noise and 0 at the image; ``x = alpha(t) clean + sigma(t) noise``.
    """

    def __call__(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Predict the clean images."""
        ...

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """The share of the clean image at time ``t``."""
        ...

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The share of noise at time ``t``."""
        ...


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch, one row per sample.

    Attributes:
        t: ``[B]`` times in (0, 1).
        noise: ``[B,C,H,W]`` standard normal.
        keep_caption: ``[B]`` bool, False where the caption is dropped for classifier-free guidance.
    """

    t: torch.Tensor
    noise: torch.Tensor
    keep_caption: torch.Tensor

    def to(self, device: torch.device | str) -> Draws:
        """The same draws for a network on another device; captions are chosen where they were kept."""
        return Draws(self.t.to(device), self.noise.to(device), self.keep_caption)


def per_row(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``[B]`` values shaped to broadcast over ``like`` ``[B,...]``."""
    return values.to(like.dtype).reshape(-1, *([1] * (like.ndim - 1)))


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


class RectifiedFlow(BaseModel):
    """Rectified flow with logit-normal times.

    Straight paths: Liu et al. 2022, "Flow Straight and Fast", eq. 1. Times: Esser et al. 2024, "Scaling
    Rectified Flow Transformers", eq. 19 and the resolution shift of eq. 23.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["rectified_flow"] = "rectified_flow"
    """Chooses this objective."""
    logit_mean: float = 0.0
    """Mean of logit(t); above 0 trains more on noise."""
    logit_std: float = Field(default=1.0, gt=0)
    """Standard deviation of logit(t)."""
    time_shift: float = Field(default=1.0, gt=0)
    """Resolution shift of t; 1 leaves it, 3 suits 1024 px latents."""
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of samples trained without their caption, for classifier-free guidance."""

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

        times, noises, keeps = [], [], []
        for epoch, sample_id in zip(epochs, sample_ids, strict=True):
            draw = noise.generator(seed, epoch, sample_id, "train")
            times.append(self.logit_mean + self.logit_std * draw.standard_normal())
            keeps.append(draw.random() >= self.caption_dropout)
            noises.append(torch.from_numpy(draw.standard_normal(shape, dtype="float32")))
        t = torch.sigmoid(torch.tensor(times, dtype=torch.float32))
        t = self.time_shift * t / (1 + (self.time_shift - 1) * t)
        return Draws(t, torch.stack(noises), torch.tensor(keeps))

    def loss(self, network: Network, clean: torch.Tensor, conditioning: Conditioning, draws: Draws) -> torch.Tensor:
        """Mean squared error of the velocity, per row ``[B]`` (Liu et al. 2022, eq. 1).

        Args:
            network: the raw network.
            clean: ``[B,C,H,W]`` images in -1..1.
            conditioning: what the network is told, dropped captions already replaced.
            draws: the batch's random numbers.
        """
        t = per_row(draws.t, clean)
        x = (1 - t) * clean + t * draws.noise
        velocity = network(x, draws.t, conditioning).float()
        return (velocity - (draws.noise - clean)).square().flatten(1).mean(1)

    def denoiser(self, network: Network) -> Denoiser:
        """The denoiser that samplers and serving see."""
        return FlowDenoiser(network)


ObjectiveConfig = RectifiedFlow
"""Every objective; the union is the registry."""
