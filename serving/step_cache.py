"""Evaluations that are left out because they would bring nothing new: a switch, off by default.

EasyCache (Zhou et al. 2025, "Less is Enough", eq. 4 to 7), with the clean image in place of the velocity: between two
evaluations the prediction changes by about as much, for what its input moved, as it did the last time. As long as the
changes that this foretells add up to less than a threshold, the last prediction is used again. It looks at what goes
into the denoiser and at what comes out, so that it suits every family; and at one row alone, so that a picture does not
depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(eq=False)
class StepCache:
    """What one row remembers of its evaluations.

    Attributes:
        threshold: relative change, added up since the last evaluation, below which it counts as nothing.
        saved: evaluations that were left out.
    """

    threshold: float
    saved: int = 0
    _x: torch.Tensor | None = field(default=None, repr=False)
    _seen: torch.Tensor | None = field(default=None, repr=False)
    _clean: torch.Tensor | None = field(default=None, repr=False)
    _rate: float | None = None
    _drift: float = 0.0

    def keep(self, x: torch.Tensor, clean: torch.Tensor) -> None:
        """Remember an evaluation: ``[C,H,W]`` where it was, and what it predicted."""
        if self._x is not None and self._clean is not None:
            moved = _norm(x - self._x)
            self._rate = _norm(clean - self._clean) / moved if moved else None
        self._x, self._seen, self._clean, self._drift = x, x, clean, 0.0

    def recall(self, x: torch.Tensor) -> torch.Tensor | None:
        """``[C,H,W]`` the last prediction, where it is as good as a new one for ``x``; None asks for an evaluation."""
        if self._rate is None or self._seen is None or self._clean is None:
            return None
        size = _norm(self._clean)
        self._drift += self._rate * _norm(x - self._seen) / size if size else 0.0
        self._seen = x
        if self._drift >= self.threshold:
            return None
        self.saved += 1
        return self._clean


def _norm(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x.float()))
