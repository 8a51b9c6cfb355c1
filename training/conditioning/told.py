"""What a denoiser is told about each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser is told about each row.

    Attributes:
        tokens: ``[rows, tokens, width]`` float32 encoder states; ``[rows, 1, 1]`` a class's number, exact in float32.
        mask: ``[rows, tokens]`` bool, True where a token is real.
        pooled: ``[rows, width]`` float32, one state for the whole caption; None where the encoder has none.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    pooled: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def rows(self, index: torch.Tensor | slice | Sequence[int]) -> Conditioning:
        """The chosen rows."""
        pooled = None if self.pooled is None else self.pooled[index]
        return Conditioning(self.tokens[index], self.mask[index], pooled)

    def to(self, device: torch.device | str) -> Conditioning:
        """The same conditioning on another device."""
        pooled = None if self.pooled is None else self.pooled.to(device)
        return Conditioning(self.tokens.to(device), self.mask.to(device), pooled)

    def expand(self, count: int) -> Conditioning:
        """Its one row, ``count`` times, without memory of their own."""
        pooled = None if self.pooled is None else self.pooled.expand(count, -1)
        return Conditioning(self.tokens.expand(count, -1, -1), self.mask.expand(count, -1), pooled)

    def where(self, keep: torch.Tensor, other: Conditioning) -> Conditioning:
        """Rows of self where ``keep`` (``[rows]`` bool) is True, rows of ``other`` elsewhere."""
        tokens = torch.where(keep[:, None, None], self.tokens, other.tokens)
        pooled = None
        if self.pooled is not None and other.pooled is not None:
            pooled = torch.where(keep[:, None], self.pooled, other.pooled)
        return Conditioning(tokens, torch.where(keep[:, None], self.mask, other.mask), pooled)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Several conditionings of one encoder, one after the other."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return Conditioning(
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.mask for part in parts]),
            torch.cat(pooled) if pooled else None,
        )

    def summary(self) -> torch.Tensor:
        """``[rows, width]``: the pooled state, or the mean of the real tokens where there is none."""
        if self.pooled is not None:
            return self.pooled
        real = self.mask[..., None].to(self.tokens.dtype)
        return (self.tokens * real).sum(1) / real.sum(1).clamp(min=1)

    def labels(self) -> torch.Tensor:
        """``[rows]`` int64: the classes' numbers."""
        return self.tokens[:, 0, 0].round().long()
