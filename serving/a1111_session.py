"""The requests of the A1111 dialect that are being made: their progress, and their interruption."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from PIL import Image

from serving.schemas import GenerationRequest


@dataclass(eq=False)
class Making:
    """One request.

    Attributes:
        wanted: what the engine was asked.
        steps: denoising steps done, by image.
        preview: the newest preview.
        interrupted: set to end it early.
    """

    wanted: GenerationRequest
    steps: dict[int, int] = field(default_factory=dict)
    preview: Image.Image | None = field(default=None, repr=False)
    interrupted: asyncio.Event = field(default_factory=asyncio.Event)
    started: float = field(default_factory=time.monotonic)

    @property
    def of(self) -> int:
        """Denoising steps of one image."""
        return self.wanted.steps_left

    @property
    def share(self) -> float:
        """0..1, how much of it is done."""
        return sum(self.steps.values()) / (self.of * self.wanted.images)

    @property
    def seconds_left(self) -> float:
        """By what the steps took so far; 0 where nothing is known."""
        return (time.monotonic() - self.started) * (1 / self.share - 1) if self.share else 0.0


class Session:
    """What this replica makes in this dialect, oldest first."""

    def __init__(self) -> None:
        self._making: list[Making] = []

    @property
    def oldest(self) -> Making | None:
        """The request whose progress is told."""
        return self._making[0] if self._making else None

    @property
    def count(self) -> int:
        """Requests being made."""
        return len(self._making)

    @contextmanager
    def enter(self, making: Making) -> Iterator[None]:
        """Count a request while it is being made."""
        self._making.append(making)
        try:
            yield
        finally:
            self._making.remove(making)

    def interrupt(self) -> None:
        """End all of them; each answers with the images that it has."""
        for making in self._making:
            making.interrupted.set()
