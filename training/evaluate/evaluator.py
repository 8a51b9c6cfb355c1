"""Evaluation while training: the held-out loss and the contact sheet, with the averaged weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from training.conditioning import Conditioning
from training.data.dataset import Split
from training.data.loader import Loader
from training.evaluate.config import EvaluationConfig
from training.evaluate.contact_sheet import contact_sheet
from training.evaluate.held_out import row_losses
from training.evaluate.samples import sample_captions, to_pictures
from training.models import apply_unet
from training.objectives import ObjectiveConfig
from training.parallel import over_ranks

if TYPE_CHECKING:
    from PIL import Image


def read_split(split: Split, resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every readable picture of a split, ``[N,3,R,R]`` in -1..1, and their sample ids ``[N]``."""
    batches = list(Loader.sequential(split, resolution, 256))
    ids = torch.tensor([sample_id for batch in batches for sample_id in batch.sample_ids], dtype=torch.long)
    empty = torch.empty(0, 3, resolution, resolution)
    return torch.cat([empty, *(batch.images for batch in batches)]), ids


class Evaluator:
    """Measures a copy of the network; every rank takes its share of the rows.

    Args:
        network: a copy that is ours to load weights into.
        objective: its loss and its denoiser.
        config: what is measured and shown.
        seed: keys every draw, so that all steps and trials are measured alike.
        images: held-out pictures ``[N,3,R,R]`` in -1..1.
        held_out: their captions' states, a row each.
        prompts: the contact sheet's captions.
        prompt_states: their states, a row each.
        unconditional: the state of the empty caption.
        device: where the network runs.
    """

    def __init__(
        self,
        network: Any,
        objective: ObjectiveConfig,
        config: EvaluationConfig,
        *,
        seed: int,
        images: torch.Tensor,
        held_out: Conditioning,
        prompts: Sequence[str],
        prompt_states: Conditioning,
        unconditional: Conditioning,
        device: torch.device | str,
        precision: str,
    ) -> None:
        self.network = network.to(device).eval().requires_grad_(False)
        self.objective, self.config, self.seed = objective, config, seed
        self.images, self.held_out = images, held_out.to(device)
        self.prompts, self.prompt_states = list(prompts), prompt_states.to(device)
        self.unconditional = unconditional.to(device)
        self.device = torch.device(device)
        self.precision = precision

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take whole weights by the network's own names."""
        self.network.load_state_dict(dict(weights))

    def _predict(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return apply_unet(self.network, x, t, conditioning).float()

    @torch.no_grad()
    def held_out_loss(self) -> float | None:
        """The mean loss over held-out rows at fixed times and noises; None without held-out rows."""
        count, repeats = len(self.images), self.config.held_out_repeats
        if not count:
            return None

        def mine(rows: list[int]) -> torch.Tensor:
            clean = self.images[rows].to(self.device)
            states = self.held_out.rows(torch.tensor(rows, device=self.device))
            return row_losses(self._predict, self.objective, clean, states, rows, seed=self.seed, repeats=repeats)

        return float(over_ranks(count, mine).mean())

    @torch.no_grad()
    def sample(self) -> torch.Tensor:
        """One picture per prompt, uint8 ``[N,3,R,R]``, at noises that never change."""
        denoiser = self.objective.denoiser(self._predict)

        def mine(rows: list[int]) -> torch.Tensor:
            return sample_captions(
                denoiser,
                self.prompt_states.rows(torch.tensor(rows, device=self.device)),
                self.unconditional,
                rows=rows,
                seed=self.seed,
                resolution=self.images.shape[-1],
                steps=self.config.sample_steps,
                guidance_scale=self.config.guidance_scale,
                time_shift=self.objective.time_shift,
            ).to(torch.int32)  # gloo sums no bytes

        return over_ranks(len(self.prompts), mine).to(torch.uint8)

    def contact_sheet(self) -> Image.Image:
        """The pictures above their captions."""
        return contact_sheet(to_pictures(self.sample()), self.prompts)
