"""One image in the engine: its row, and what its owner is told."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import torch
from PIL import Image

from serving.batching import Row
from serving.bucket import Bucket
from serving.errors import DeadlineError, EngineError
from serving.schemas import Event, GenerationRequest, ImageReady, Preview, Progress
from training.canvas import Canvas

Outbox = asyncio.Queue[Event | EngineError | DeadlineError]
"""A request's events; an error is the last one."""


@dataclass(eq=False)
class Job:
    """One image in the engine.

    Attributes:
        request: whose image it is.
        index: which of its request's images.
        seed: the seed that makes it alone.
        row: where it is.
        arrived_s: when its request was accepted.
        outbox: its request's events.
        previews_due: steps after which a preview is shown, the next one last.
        canvas: where the model draws.
        padded_rows: of the calls of its size.
        cancelled: nobody wants it any more.
    """

    request: GenerationRequest
    index: int
    seed: int
    row: Row
    arrived_s: float
    outbox: Outbox
    previews_due: list[int]
    canvas: Canvas
    padded_rows: int
    cancelled: bool = False
    _shown: int = 0

    @property
    def bucket(self) -> Bucket:
        """Whom it may share a call with."""
        return Bucket(self.request.height, self.request.width, self.request.adapter)

    @property
    def place(self) -> int:
        """Which of its request's images, from 1."""
        return self.index + 1

    @property
    def priority(self) -> int:
        """0, the most urgent, to 9."""
        return self.request.priority

    @property
    def deadline_at_s(self) -> float | None:
        """When nobody wants it any more."""
        return None if self.request.deadline_s is None else self.arrived_s + self.request.deadline_s

    @property
    def evaluations_left(self) -> int:
        """How often the network is still asked about it."""
        return self.row.trajectory.evaluations_left

    @property
    def takes(self) -> int:
        """Rows of a call."""
        return self.row.takes

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return Progress(self.index, self.row.trajectory.step, self.row.trajectory.steps)

    def to_draw(self) -> torch.Tensor | None:
        """``[C,H,W]`` what there is to draw after an evaluation: the picture, or a preview that is due."""
        trajectory = self.row.trajectory
        if trajectory.finished:
            return trajectory.x
        if not self.previews_due or trajectory.step < self.previews_due[-1]:
            return None
        self.previews_due.pop()
        return self.row.clean

    def draw(self, x: torch.Tensor, *, final: bool) -> ImageReady | Preview:
        """The picture, or a preview, of what ``to_draw`` gave: on the thread for it."""
        made = self.canvas.pictures(x[None])[0]
        picture = to_picture(made if self.row.kept is None else self.row.kept.finish(made))
        if final:
            return ImageReady(self.index, self.seed, picture, self.padded_rows)
        self._shown += 1
        return Preview(self.index, self._shown - 1, picture)


def preview_steps(steps: int, previews: int) -> list[int]:
    """The steps after which previews are due, the last one first; never the last step, which has the picture."""
    return sorted({steps * (number + 1) // (previews + 1) for number in range(previews)} - {0, steps}, reverse=True)


def to_picture(x: torch.Tensor) -> Image.Image:
    """``[3,H,W]`` in -1..1, clipped, to an RGB picture."""
    levels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy(), "RGB")
