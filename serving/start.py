"""Where a trajectory begins: at noise, or at a given picture with noise over it; and what a mask keeps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from serving.schemas import GenerationRequest
from training import noise
from training.canvas import Canvas
from training.objectives import Denoiser, per_row
from training.samplers import Trajectory


@dataclass(frozen=True, eq=False)
class Kept:
    """The part of a given picture that an edit leaves alone.

    After every move the kept part is set to the picture itself with the noise of that time (Lugmayr et al. 2022,
    "RePaint", eq. 8, with one noise for all times); at the end it is the picture, bit for bit.

    Attributes:
        clean: ``[C,H,W]`` the picture in -1..1, or its latent.
        noise: ``[C,H,W]`` standard normal.
        free: ``[1,H,W]`` bool, whether it may change there; a value of a latent may where any of its pixels may.
        picture: ``[3,H,W]`` the picture itself in pixels, where a model draws latents: decoding loses a little.
        free_pixels: ``[1,H,W]`` bool, whether it may change there.
    """

    clean: torch.Tensor
    noise: torch.Tensor
    free: torch.Tensor
    picture: torch.Tensor | None = None
    free_pixels: torch.Tensor | None = None

    def apply(self, denoiser: Denoiser, trajectory: Trajectory) -> None:
        """Put the kept part back into a trajectory that has just moved."""
        known = noised(denoiser, self.clean, self.noise, trajectory.t[None])
        trajectory.x = torch.where(self.free, trajectory.x, known)

    def over(self, clean: torch.Tensor) -> torch.Tensor:
        """``[C,H,W]`` a predicted clean image with the kept part in it."""
        return torch.where(self.free, clean, self.clean)

    def finish(self, picture: torch.Tensor) -> torch.Tensor:
        """``[3,H,W]`` a picture that was made, with the kept pixels in it."""
        if self.picture is None or self.free_pixels is None:
            return picture
        return torch.where(self.free_pixels, picture, self.picture)


def noised(denoiser: Denoiser, clean: torch.Tensor, drawn: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """``[C,H,W]`` the picture at time ``t`` ``[1]``."""
    alpha, sigma = denoiser.alpha(t), denoiser.sigma(t)
    return (per_row(alpha, clean[None]) * clean + per_row(sigma, clean[None]) * drawn)[0]


def begin(
    request: GenerationRequest, seed: int, denoiser: Denoiser, grid: torch.Tensor, canvas: Canvas, *, device: str
) -> tuple[Trajectory, Kept | None]:
    """The trajectory of one image, a function of the request and the seed alone.

    A given picture starts at the time that ``strength`` names (Meng et al. 2022, "SDEdit"): of the request's steps,
    only the last ``steps_left`` are taken.

    Args:
        request: what is asked.
        seed: of this image.
        denoiser: gives alpha and sigma.
        grid: ``[steps + 1]`` times of the request's steps.
        canvas: where the model draws.
        device: where the tensors go.
    """
    grid = grid.to(device)
    shape = (canvas.channels, request.height // canvas.factor, request.width // canvas.factor)
    drawn = noise.normal(seed, "serve", shape=shape).to(device)
    start = request.start
    if start is None:
        return Trajectory(drawn, grid, request.sampler, seed), None
    grid = grid[request.steps - request.steps_left :]
    picture = _pixels(start.image).to(device)
    clean = canvas.clean(picture[None])[0]
    trajectory = Trajectory(noised(denoiser, clean, drawn, grid[:1]), grid, request.sampler, seed)
    if start.mask is None:
        return trajectory, None
    free = torch.from_numpy(np.asarray(start.mask) >= 128)[None].to(device)
    if canvas.factor == 1:
        return trajectory, Kept(clean, drawn, free)
    coarse = torch.nn.functional.max_pool2d(free.float(), canvas.factor).bool()
    return trajectory, Kept(clean, drawn, coarse, picture, free)


def _pixels(image: Image.Image) -> torch.Tensor:
    """``[3,H,W]`` in -1..1."""
    levels = torch.from_numpy(np.array(image.convert("RGB")))
    return levels.permute(2, 0, 1).float() / 127.5 - 1
