"""A network that is told nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from training.conditioning.shape import ConditioningShape
from training.conditioning.told import Conditioning
from training.errors import UsageError


class NoEncoder:
    """Every caption becomes the same row."""

    shape = ConditioningShape("none")
    hash = hashlib.sha256(b"nothing").hexdigest()

    def check(self, prompt: str) -> None:
        """Refuse a prompt, for it would be passed over.

        Raises:
            UsageError: there is one.
        """
        if prompt.strip():
            raise UsageError(
                "This model takes no prompt: it makes pictures like those it has seen, whichever they are.",
                value=prompt if len(prompt) <= 80 else prompt[:77] + "...",
                rule="an empty prompt, or a space where a client sends no empty one",
            )

    def encode(self, captions: Sequence[str]) -> Conditioning:
        """A row per caption."""
        return Conditioning(torch.zeros(len(captions), 1, 1), torch.ones(len(captions), 1, dtype=torch.bool))
