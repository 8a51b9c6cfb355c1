"""One denoising step for rows that share nothing but the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from training.conditioning import Conditioning
from training.objectives import Denoiser, per_row
from training.samplers import euler_step


@dataclass(eq=False)
class Row:
    """One image on its way from noise to picture.

    Attributes:
        x: ``[C,H,W]`` the image at ``times[step]``.
        times: ``[steps + 1]`` from 1 to 0.
        conditioning: one row, the prompt.
        negative: one row, what guidance leads away from; None is unguided.
        scale: guidance scale.
        step: steps taken.
    """

    x: torch.Tensor
    times: torch.Tensor
    conditioning: Conditioning
    negative: Conditioning | None
    scale: float
    step: int = 0

    @property
    def width(self) -> int:
        """Rows of the network's batch that this image takes: itself and, where guided, its twin."""
        return 1 if self.negative is None else 2

    @property
    def steps(self) -> int:
        """Denoising steps in all."""
        return len(self.times) - 1

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.step >= self.steps


@torch.inference_mode()
def denoise(denoiser: Denoiser, rows: Sequence[Row], padded_rows: int) -> None:
    """Take one step of every row, each at its own time, with its own guidance.

    Guided rows bring their unconditional twin into the same call (Ho and Salimans 2022, eq. 6).
    """
    x = torch.stack([row.x for row in rows])
    t = torch.stack([row.times[row.step] for row in rows])
    t_next = torch.stack([row.times[row.step + 1] for row in rows])
    guided = [place for place, row in enumerate(rows) if row.negative is not None]
    conditioning = Conditioning.cat(
        [row.conditioning for row in rows] + [row.negative for row in rows if row.negative is not None]
    )
    clean = _predict(denoiser, torch.cat([x, x[guided]]), torch.cat([t, t[guided]]), conditioning, padded_rows)
    clean, negative = clean[: len(rows)], clean[len(rows) :]
    scale = torch.tensor([rows[place].scale for place in guided], device=x.device)
    clean[guided] = negative + per_row(scale, x) * (clean[guided] - negative)
    for row, moved in zip(rows, euler_step(denoiser, x, clean, t, t_next), strict=True):
        row.x = moved
        row.step += 1


def _predict(
    denoiser: Denoiser, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, padded_rows: int
) -> torch.Tensor:
    """The denoiser over any number of rows, in calls of exactly ``padded_rows``.

    Kernels are chosen, and sums ordered, by the batch's shape: with one shape a row's bits do not depend on how
    many neighbours it has. The last call is filled up with copies of the last row.
    """
    count = len(x)
    padded = -(-count // padded_rows) * padded_rows
    index = torch.arange(padded, device=x.device).clamp(max=count - 1)
    calls = [denoiser(x[part], t[part], conditioning.rows(part)) for part in index.reshape(-1, padded_rows)]
    return torch.cat(calls)[:count]
