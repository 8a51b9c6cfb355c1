"""Where a trajectory begins: at noise, or at a given picture with noise over it; and what a mask keeps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from serving.schemas import GenerationRequest
from training import noise
from training.objectives import Denoiser, per_row
from training.samplers import Trajectory, times


@dataclass(frozen=True, eq=False)
class Kept:
    """The part of a given picture that an edit leaves alone.

    After every move the kept part is set to the picture itself with the noise of that time (Lugmayr et al. 2022,
    "RePaint", eq. 8, with one noise for all times); at the end it is the picture, bit for bit.

    Attributes:
        clean: ``[C,H,W]`` the picture in -1..1.
        noise: ``[C,H,W]`` standard normal.
        free: ``[1,H,W]`` bool, whether the picture may change there.
    """

    clean: torch.Tensor
    noise: torch.Tensor
    free: torch.Tensor

    def apply(self, denoiser: Denoiser, trajectory: Trajectory) -> None:
        """Put the kept part back into a trajectory that has just moved."""
        known = noised(denoiser, self.clean, self.noise, trajectory.t[None])
        trajectory.x = torch.where(self.free, trajectory.x, known)

    def over(self, clean: torch.Tensor) -> torch.Tensor:
        """``[C,H,W]`` a predicted clean image with the kept part in it."""
        return torch.where(self.free, clean, self.clean)


def noised(denoiser: Denoiser, clean: torch.Tensor, drawn: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """``[C,H,W]`` the picture at time ``t`` ``[1]``."""
    alpha, sigma = denoiser.alpha(t), denoiser.sigma(t)
    return (per_row(alpha, clean[None]) * clean + per_row(sigma, clean[None]) * drawn)[0]


def begin(
    request: GenerationRequest, seed: int, denoiser: Denoiser, *, time_shift: float, device: str
) -> tuple[Trajectory, Kept | None]:
    """The trajectory of one image, a function of the request and the seed alone.

    A given picture starts at the time that ``strength`` names (Meng et al. 2022, "SDEdit"): of the request's steps,
    only the last ``steps_left`` are taken.

    Args:
        request: what is asked.
        seed: of this image.
        denoiser: gives alpha and sigma.
        time_shift: of the model.
        device: where the tensors go.
    """
    grid = times(request.steps, time_shift).to(device)
    drawn = noise.normal(seed, "serve", shape=(3, request.size, request.size)).to(device)
    start = request.start
    if start is None:
        return Trajectory(drawn, grid, request.sampler, seed), None
    grid = grid[request.steps - request.steps_left :]
    clean = _pixels(start.image).to(device)
    trajectory = Trajectory(noised(denoiser, clean, drawn, grid[:1]), grid, request.sampler, seed)
    if start.mask is None:
        return trajectory, None
    free = torch.from_numpy(np.asarray(start.mask) >= 128)[None].to(device)
    return trajectory, Kept(clean, drawn, free)


def _pixels(image: Image.Image) -> torch.Tensor:
    """``[3,H,W]`` in -1..1."""
    levels = torch.from_numpy(np.array(image.convert("RGB")))
    return levels.permute(2, 0, 1).float() / 127.5 - 1
