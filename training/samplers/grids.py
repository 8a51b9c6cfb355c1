"""Where a sampler asks: grids of times from noise to image."""

from __future__ import annotations

import torch


def times(steps: int, shift: float = 1.0) -> torch.Tensor:
    """``[steps + 1]`` times from 1 to 0, evenly spaced and then shifted (Esser et al. 2024, eq. 23)."""
    even = torch.linspace(1.0, 0.0, steps + 1)
    return shift * even / (1 + (shift - 1) * even)
