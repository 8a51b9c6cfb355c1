"""One image in the engine: its row, and what its owner is told."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from PIL import Image

from serving.batching import Row
from serving.errors import EngineError
from serving.schemas import Event, ImageReady, Preview, Progress
from training.canvas import Canvas


@dataclass(eq=False)
class Job:
    """One image in the engine.

    Attributes:
        index: which of its request's images.
        seed: the seed that makes it alone.
        row: where it is.
        outbox: its request's events.
        previews_due: steps after which a preview is shown, the next one last.
        canvas: where the model draws.
        cancelled: nobody wants it any more.
        image: the picture, once it is finished.
    """

    index: int
    seed: int
    row: Row
    outbox: asyncio.Queue[Event | EngineError]
    previews_due: list[int]
    canvas: Canvas
    cancelled: bool = False
    image: Image.Image | None = field(default=None, repr=False)
    _preview: Image.Image | None = field(default=None, repr=False)
    _shown: int = 0

    def draw(self) -> None:
        """Make the picture, or a preview that is due, from tensors: on the thread that owns them."""
        trajectory = self.row.trajectory
        if trajectory.finished:
            self.image = self._drawn(trajectory.x)
        elif self.previews_due and trajectory.step >= self.previews_due[-1] and self.row.clean is not None:
            self.previews_due.pop()
            self._preview = self._drawn(self.row.clean)

    def _drawn(self, x: torch.Tensor) -> Image.Image:
        """What the model made, as a picture."""
        picture = self.canvas.pictures(x[None])[0]
        return to_picture(picture if self.row.kept is None else self.row.kept.finish(picture))

    def news(self) -> Iterator[Event]:
        """What the last evaluation brought."""
        yield Progress(self.index, self.row.trajectory.step, self.row.trajectory.steps)
        if self._preview is not None:
            yield Preview(self.index, self._shown, self._preview)
            self._preview = None
            self._shown += 1
        if self.image is not None:
            yield ImageReady(self.index, self.seed, self.image)


def preview_steps(steps: int, previews: int) -> list[int]:
    """The steps after which previews are due, the last one first; never the last step, which has the picture."""
    return sorted({steps * (number + 1) // (previews + 1) for number in range(previews)} - {0, steps}, reverse=True)


def to_picture(x: torch.Tensor) -> Image.Image:
    """``[3,H,W]`` in -1..1, clipped, to an RGB picture."""
    levels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy(), "RGB")
