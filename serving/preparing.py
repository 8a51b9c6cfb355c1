"""From a request to the images that wait for their turn: prompts read, noise drawn, given pictures encoded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import torch

from serving.batching import Row
from serving.errors import RequestError
from serving.job import Job, Outbox, preview_steps
from serving.prompt_cache import Encoder, PromptCache
from serving.schemas import GenerationRequest
from serving.speed import SpeedConfig
from serving.start import begin
from serving.step_cache import StepCache
from training.canvas import Canvas
from training.errors import UsageError
from training.objectives import Denoiser

_CACHEABLE = ("euler", "dpmpp_2m")
"""Samplers that neither draw noise nor correct themselves, so that an evaluation can be left out."""


@dataclass(frozen=True)
class Preparing:
    """What images are made with. A picture is a function of its request alone, and so is everything here.

    Attributes:
        denoiser: the model.
        encoder: prompts to conditioning.
        prompts: those that were encoded before.
        canvas: where the model draws.
        grid: the times of so many steps.
        speed: what may be left out.
        device: where the tensors go.
    """

    denoiser: Denoiser
    encoder: Encoder
    prompts: PromptCache
    canvas: Canvas
    grid: Callable[[int], torch.Tensor]
    speed: SpeedConfig
    device: str

    def jobs(self, request: GenerationRequest, arrived_s: float, padded_rows: int) -> tuple[list[Job], int]:
        """The request's images, and the tokens that its prompt was read as; on the text thread.

        Args:
            request: whose size the model can make.
            arrived_s: when it was accepted.
            padded_rows: of the calls of its size.

        Raises:
            RequestError: a prompt is too long.
        """
        for param in ("prompt", "negative_prompt"):
            try:
                self.encoder.check(getattr(request, param))
            except UsageError as error:
                raise RequestError(error, param=param) from error
        prompt = self.prompts.encode(self.encoder, request.prompt, self.device)
        negative = None
        if request.guidance_scale != 1:
            negative = self.prompts.encode(self.encoder, request.negative_prompt, self.device)
        outbox: Outbox = asyncio.Queue()
        jobs = []
        for index in range(request.images):
            seed = request.seed + index
            grid = self.grid(request.steps)
            trajectory, kept = begin(request, seed, self.denoiser, grid, self.canvas, device=self.device)
            row = Row(trajectory, prompt, negative, request.guidance_scale, kept, self._cache(request))
            previews = preview_steps(request.steps_left, request.previews)
            jobs.append(Job(request, index, seed, row, arrived_s, outbox, previews, self.canvas, padded_rows))
        return jobs, int(prompt.mask[0].sum())

    def _cache(self, request: GenerationRequest) -> StepCache | None:
        if not self.speed.step_cache or request.sampler not in _CACHEABLE:
            return None
        return StepCache(self.speed.step_cache)


def evaluations(request: GenerationRequest) -> int:
    """How often the network is asked about one of a request's images; Heun's last step is one of Euler's."""
    return 2 * request.steps_left - 1 if request.sampler == "heun" else request.steps_left


def rows_of(request: GenerationRequest) -> int:
    """Rows of the network's batch that all of a request's images take."""
    return request.images * (1 if request.guidance_scale == 1 else 2)
