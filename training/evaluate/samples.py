"""Pictures of captions at noises that never change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from training import noise
from training.canvas import Canvas
from training.conditioning import Conditioning
from training.objectives import Denoiser
from training.samplers import Guided, sample

if TYPE_CHECKING:
    from PIL import Image


@torch.no_grad()
def sample_captions(
    denoiser: Denoiser,
    conditioning: Conditioning,
    unconditional: Conditioning,
    *,
    rows: Sequence[int],
    seed: int,
    canvas: Canvas,
    grid: torch.Tensor,
    guidance_scale: float,
    batch: int = 64,
) -> torch.Tensor:
    """One picture per caption.

    Args:
        denoiser: predicts clean pictures.
        conditioning: the captions' states, a row each.
        unconditional: the one row of the empty caption.
        rows: number of each picture; its noise depends on ``(seed, number)`` alone.
        seed: keys the noise.
        canvas: where the network draws.
        grid: ``[steps + 1]`` times, such as the objective gives.
        guidance_scale: classifier-free guidance; 1 is none.
        batch: pictures made at a time.

    Returns:
        uint8 ``[N,3,R,R]``.
    """
    pictures = []
    for start in range(0, len(rows), batch):
        part = slice(start, start + batch)
        told = conditioning.rows(part)
        count, device = len(told), told.tokens.device
        noises = [noise.normal(seed, row, "sample", shape=canvas.shape) for row in rows[part]]
        negative = unconditional.expand(count).to(device)
        guided = Guided(denoiser, negative, torch.full((count,), guidance_scale, device=device))
        used = guided if guidance_scale != 1 else denoiser
        x = canvas.pictures(sample(used, torch.stack(noises).to(device), told, grid))
        pictures.append(((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(pictures)


def to_pictures(images: torch.Tensor) -> list[Image.Image]:
    """Pillow pictures of uint8 ``[N,3,H,W]``."""
    from PIL import Image

    return [Image.fromarray(array) for array in images.permute(0, 2, 3, 1).cpu().numpy()]
