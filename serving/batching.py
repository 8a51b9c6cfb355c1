"""One denoising step for rows that share nothing but the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from serving.start import Kept
from training.conditioning import Conditioning
from training.objectives import Denoiser, per_row
from training.samplers import Trajectory, advance


@dataclass(eq=False)
class Row:
    """One image on its way from noise to picture.

    Attributes:
        trajectory: where it is and how it moves.
        conditioning: one row, the prompt.
        negative: one row, what guidance leads away from; None is unguided.
        scale: guidance scale.
        kept: the part of a given picture that is left alone; None lets all of it change.
        clean: ``[C,H,W]`` the clean image that was predicted last, for previews; None before the first.
    """

    trajectory: Trajectory
    conditioning: Conditioning
    negative: Conditioning | None
    scale: float
    kept: Kept | None = None
    clean: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """Rows of the network's batch that this image takes: itself and, where guided, its twin."""
        return 1 if self.negative is None else 2


@torch.inference_mode()
def denoise(denoiser: Denoiser, rows: Sequence[Row], padded_rows: int) -> None:
    """One evaluation for every row, each at its own time, with its own sampler and guidance.

    Guided rows bring their unconditional twin into the same call (Ho and Salimans 2022, eq. 6).
    """
    x = torch.stack([row.trajectory.x for row in rows])
    t = torch.stack([row.trajectory.t for row in rows])
    guided = [place for place, row in enumerate(rows) if row.negative is not None]
    conditioning = Conditioning.cat(
        [row.conditioning for row in rows] + [row.negative for row in rows if row.negative is not None]
    )
    clean = _predict(denoiser, torch.cat([x, x[guided]]), torch.cat([t, t[guided]]), conditioning, padded_rows)
    clean, negative = clean[: len(rows)], clean[len(rows) :]
    scale = torch.tensor([rows[place].scale for place in guided], device=x.device)
    clean[guided] = negative + per_row(scale, x) * (clean[guided] - negative)
    for row, predicted in zip(rows, clean, strict=True):
        row.clean = predicted if row.kept is None else row.kept.over(predicted)
    advance(denoiser, [row.trajectory for row in rows], clean)
    for row in rows:
        if row.kept is not None:
            row.kept.apply(denoiser, row.trajectory)


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
