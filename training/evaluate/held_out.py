"""The held-out loss: the objective on pictures that training never saw, at draws that never change."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from training.conditioning import Conditioning
from training.objectives import Draws, Network, ObjectiveConfig


@torch.no_grad()
def row_losses(
    network: Network,
    objective: ObjectiveConfig,
    clean: torch.Tensor,
    conditioning: Conditioning,
    sample_ids: Sequence[int],
    *,
    seed: int,
    repeats: int,
) -> torch.Tensor:
    """The mean loss of each row over ``repeats`` times and noises, captions always kept.

    A row's draws depend on ``(seed, repeat, sample id)`` alone, so every step, trial and worker count is measured
    alike. Epochs below 0 keep them apart from training's draws.

    Args:
        network: the raw network.
        objective: its loss and its draws.
        clean: ``[B,C,H,W]`` pictures in -1..1.
        conditioning: their captions' states.
        sample_ids: their ids in the held-out split.
        seed: the run's seed.
        repeats: draws per row.

    Returns:
        ``[B]`` losses.
    """
    total = torch.zeros(len(clean), device=clean.device)
    everyone = torch.ones(len(clean), dtype=torch.bool)
    for repeat in range(repeats):
        drawn = objective.draw(seed, [-1 - repeat] * len(clean), list(sample_ids), tuple(clean.shape[1:]))
        draws = Draws(drawn.t.to(clean.device), drawn.noise.to(clean.device), everyone)
        total += objective.loss(network, clean, conditioning, draws)
    return total / repeats
