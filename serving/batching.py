"""One denoising step for rows that share nothing but the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from serving.start import Kept
from serving.step_cache import StepCache
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
        cache: of its evaluations; None leaves none out.
        clean: ``[C,H,W]`` the clean image that was predicted last, for previews; None before the first.
    """

    trajectory: Trajectory
    conditioning: Conditioning
    negative: Conditioning | None
    scale: float
    kept: Kept | None = None
    cache: StepCache | None = None
    clean: torch.Tensor | None = None

    @property
    def takes(self) -> int:
        """Rows of the network's batch that this image takes: itself and, where guided, its twin."""
        return 1 if self.negative is None else 2

    def recalled(self) -> torch.Tensor | None:
        """``[C,H,W]`` what the network would predict next, where that is known; the last step is never left out."""
        if self.cache is None or self.trajectory.steps - self.trajectory.step < 2:
            return None
        return self.cache.recall(self.trajectory.x)


@torch.inference_mode()
def denoise(denoiser: Denoiser, rows: Sequence[Row], padded_rows: int) -> None:
    """One evaluation for every row, each at its own time, with its own sampler and guidance.

    A row that can do without the next ones takes them too: then whoever is in a call needs it.
    """
    clean = _guided(denoiser, rows, padded_rows)
    for row, predicted in zip(rows, clean, strict=True):
        if row.cache is not None:
            row.cache.keep(row.trajectory.x, predicted)
    _move(denoiser, rows, clean)
    for row in rows:
        while (known := row.recalled()) is not None:
            _move(denoiser, [row], known[None])


def _guided(denoiser: Denoiser, rows: Sequence[Row], padded_rows: int) -> torch.Tensor:
    """``[rows,C,H,W]`` the clean images.

    Guided rows bring their unconditional twin into the same call (Ho and Salimans 2022, eq. 6).
    """
    x = torch.stack([row.trajectory.x for row in rows])
    t = torch.stack([row.trajectory.t for row in rows])
    guided = [place for place, row in enumerate(rows) if row.negative is not None]
    conditioning = Conditioning.cat(
        [row.conditioning for row in rows] + [row.negative for row in rows if row.negative is not None]
    )
    clean = predict(denoiser, torch.cat([x, x[guided]]), torch.cat([t, t[guided]]), conditioning, padded_rows)
    clean, negative = clean[: len(rows)], clean[len(rows) :]
    scale = torch.tensor([rows[place].scale for place in guided], device=x.device)
    clean[guided] = negative + per_row(scale, x) * (clean[guided] - negative)
    return clean


def _move(denoiser: Denoiser, rows: Sequence[Row], clean: torch.Tensor) -> None:
    """Every row goes where its sampler leads, and keeps what an edit leaves alone."""
    for row, predicted in zip(rows, clean, strict=True):
        row.clean = predicted if row.kept is None else row.kept.over(predicted)
    advance(denoiser, [row.trajectory for row in rows], clean)
    for row in rows:
        if row.kept is not None:
            row.kept.apply(denoiser, row.trajectory)


def predict(
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
