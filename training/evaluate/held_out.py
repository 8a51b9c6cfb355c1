"""The held-out loss: a measure of its own, on pictures that training never saw.

It is the mean squared error of rectified flow's velocity at times even over (0, 1), and not the training loss: its
times and noises come from a key of the evaluation, whatever the recipe's seed or its schedule of times say, and a
network that predicts something else is asked at the same ratios of noise to image (``Objective.velocity_loss``). Runs
that differ in any of these are measured alike and compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from training import noise
from training.conditioning import Conditioning
from training.data.dataset import Split
from training.evaluate.held_out_latents import HeldOutLatents
from training.evaluate.pictures import read_pictures
from training.objectives import Draws, Network, ObjectiveConfig

_KEY = 0
"""Keys the draws; no recipe changes it."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out pictures that are measured.

    Attributes:
        split: where they are read from.
        sample_ids: which, by their index in the split.
        states: their captions' states, a row each.
        latents: what the network sees of them; None where it sees their pixels.
    """

    split: Split
    sample_ids: Sequence[int]
    states: Conditioning
    latents: HeldOutLatents | None = None

    def clean(self, sample_ids: Sequence[int], resolution: int) -> tuple[torch.Tensor, list[int]]:
        """``[N,C,H,W]`` what the network is to predict for these, and the places of those that can be read."""
        if self.latents is not None:
            return self.latents.read(sample_ids)
        pixels, places = read_pictures(self.split, sample_ids, resolution)
        return pixels.float().div_(127.5).sub_(1.0), places


def draw(sample_ids: Sequence[int], repeat: int, repeats: int, shape: tuple[int, ...]) -> Draws:
    """The times and noises of one repeat, each a function of ``(repeat, sample id)`` alone; captions are kept.

    The times of a sample's repeats are stratified: repeat r of R lies at ``(r + u) / R`` with u even in 0..1.

    Args:
        sample_ids: the id of each row.
        repeat: which, from 0.
        repeats: how many there are.
        shape: the shape of one picture, ``(C, H, W)``.
    """
    times, noises = [], []
    for sample_id in sample_ids:
        drawn = noise.generator(_KEY, "held out", repeat, sample_id)
        times.append((repeat + drawn.random()) / repeats)
        noises.append(torch.from_numpy(drawn.standard_normal(shape, dtype="float32")))
    everyone = torch.ones(len(noises), dtype=torch.bool)
    return Draws(torch.tensor(times, dtype=torch.float32), torch.stack(noises), everyone)


@torch.no_grad()
def row_losses(
    network: Network,
    objective: ObjectiveConfig,
    clean: torch.Tensor,
    conditioning: Conditioning,
    sample_ids: Sequence[int],
    *,
    repeats: int,
) -> torch.Tensor:
    """The mean loss of each row over ``repeats`` times and noises.

    Args:
        network: the raw network.
        objective: tells what the network predicts; its own draws are not used.
        clean: ``[B,C,H,W]`` pictures in -1..1.
        conditioning: their captions' states.
        sample_ids: their ids in the held-out split.
        repeats: draws per row.

    Returns:
        ``[B]`` losses.
    """
    total = torch.zeros(len(clean), device=clean.device)
    for repeat in range(repeats):
        draws = draw(sample_ids, repeat, repeats, tuple(clean.shape[1:])).to(clean.device)
        total += objective.velocity_loss(network, clean, conditioning, draws)
    return total / repeats


def measure(
    network: Network,
    objective: ObjectiveConfig,
    held_out: HeldOut,
    rows: Sequence[int],
    *,
    resolution: int,
    repeats: int,
    batch: int,
    device: torch.device,
) -> torch.Tensor:
    """Losses of some of the held-out pictures, read and computed ``batch`` at a time: memory does not grow with them.

    Args:
        network: the raw network.
        objective: tells what the network predicts.
        held_out: the pictures.
        rows: which of them.
        resolution: side in pixels.
        repeats: draws per row.
        batch: rows of one forward pass.
        device: where the network runs.

    Returns:
        ``[rows, 2]``: the loss and 1; 0 and 0 where the picture cannot be read.
    """
    result = torch.zeros(len(rows), 2, device=device)
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        clean, places = held_out.clean([held_out.sample_ids[row] for row in part], resolution)
        if not places:
            continue
        found = [part[place] for place in places]
        clean = clean.to(device)
        told = held_out.states.rows(torch.tensor(found)).to(device)
        ids = [held_out.sample_ids[row] for row in found]
        losses = row_losses(network, objective, clean, told, ids, repeats=repeats)
        result[torch.tensor(places, device=device) + start] = torch.stack([losses, torch.ones_like(losses)], dim=1)
    return result
