"""Evaluation while training: the held-out loss and the contact sheet, with the averaged weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from training import models
from training.canvas import Canvas
from training.conditioning import Conditioning
from training.errors import DataError, TrainingError
from training.evaluate.config import EvaluationConfig
from training.evaluate.contact_sheet import contact_sheet
from training.evaluate.held_out import HeldOut, measure
from training.evaluate.samples import sample_captions, to_pictures
from training.models.trained import load_trained, trained_names
from training.objectives import ObjectiveConfig
from training.parallel import over_ranks

if TYPE_CHECKING:
    from PIL import Image


class Evaluator:
    """Measures a copy of the network; every rank takes its share of the rows.

    Args:
        network: a copy that is ours to load weights into.
        objective: its loss and its denoiser.
        config: what is measured and shown.
        seed: keys the contact sheet's noises; the held-out loss has a key of its own.
        canvas: where the network draws.
        held_out: what the loss is measured on; None where there is nothing.
        prompts: the contact sheet's captions.
        prompt_states: their states, a row each.
        unconditional: the state of the empty caption.
        device: where the network runs.
        precision: of the matrix products, ``"bf16"`` or ``"fp32"``.
    """

    def __init__(
        self,
        network: Any,
        objective: ObjectiveConfig,
        config: EvaluationConfig,
        *,
        seed: int,
        canvas: Canvas,
        held_out: HeldOut | None,
        prompts: Sequence[str],
        prompt_states: Conditioning,
        unconditional: Conditioning,
        device: torch.device | str,
        precision: str,
    ) -> None:
        self.trained = trained_names(network)
        self.network = network.to(device).eval().requires_grad_(False)
        self.objective, self.config, self.seed = objective, config, seed
        self.canvas, self.held_out = canvas.on(device), held_out
        self.prompts, self.prompt_states = list(prompts), prompt_states.to(device)
        self.unconditional = unconditional.to(device)
        self.device = torch.device(device)
        self.precision = precision

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take whole weights by the network's own names: those that are trained."""
        load_trained(self.network, weights, self.trained)

    def _predict(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return models.apply(self.network, x, t, conditioning).float()

    @torch.no_grad()
    def held_out_loss(self) -> float | None:
        """The mean loss over the held-out pictures, as ``held_out`` defines it; None where there are none.

        Every rank calls it, and gets the same value or error.

        Raises:
            DataError: none of the pictures can be read.
            TrainingError: the loss is not finite.
        """
        if self.held_out is None or not self.held_out.sample_ids:
            return None
        held_out = self.held_out
        measured = over_ranks(len(held_out.sample_ids), lambda rows: self._measure(held_out, rows)).double().sum(0)
        total, count = measured.tolist()
        if not count:
            raise DataError(
                "No held-out picture can be read.",
                value=f"{len(held_out.sample_ids)} of them",
                rule="at least one readable held-out picture",
                mend="darkroom data show --verify compares every file with its checksum",
            )
        if not math.isfinite(total):
            raise TrainingError(
                "The held-out loss is not a number: the averaged weights have diverged.",
                value=total,
                rule="a finite loss",
                mend="a new run with a lower optimizer.learning_rate or more schedule.warmup_steps",
            )
        return float(total / count)

    def _measure(self, held_out: HeldOut, rows: list[int]) -> torch.Tensor:
        return measure(
            self._predict,
            self.objective,
            held_out,
            rows,
            resolution=self.canvas.resolution,
            repeats=self.config.held_out_repeats,
            batch=self.config.batch,
            device=self.device,
        )

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
                canvas=self.canvas,
                grid=self.objective.grid(self.config.sample_steps),
                guidance_scale=self.config.guidance_scale,
                batch=self.config.batch,
            ).to(torch.int32)  # gloo sums no bytes

        return over_ranks(len(self.prompts), mine).to(torch.uint8)

    def contact_sheet(self) -> Image.Image:
        """The pictures above their captions."""
        return contact_sheet(to_pictures(self.sample()), self.prompts)
