"""What an objective speaks of: the network, the denoiser and a batch's random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from training.conditioning import Conditioning


class Network(Protocol):
    """A network's raw prediction: ``(x [B,C,H,W], t [B], conditioning) -> [B,C,H,W]``.

    ``t`` is the objective's network time: 1/1000 of what diffusers' embedding of that time is told, so 0..1 except
    for ``edm``, whose networks are told ``log(sigma) / 4``.
    """

    def __call__(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Predict."""
        ...


class Denoiser(Protocol):
    """``(x [B,C,H,W], t [B], conditioning) -> predicted clean images [B,C,H,W]``.

    ``t`` is a vector, one time per row, 1 at pure noise and 0 at the image; ``x = alpha(t) clean + sigma(t) noise``.
    At 0 alpha is 1 and sigma 0, exactly; at 1 ``x`` is taken from standard normal noise.
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
        t: ``[B]`` times in (0, 1].
        noise: ``[B,C,H,W]`` standard normal; the objective's offset noise is in it.
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
