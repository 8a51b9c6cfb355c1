"""Where a network draws: pixels, or the latents of an autoencoder."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from training.autoencoder import Autoencoder, LatentSpace, autoencoder_directory


@dataclass(frozen=True)
class Canvas:
    """Where a network draws.

    Attributes:
        resolution: side of the square pictures, in pixels.
        autoencoder_at: directory of the autoencoder; None where the network draws pixels.
        device: where the autoencoder runs.
    """

    resolution: int
    autoencoder_at: Path | None = None
    device: torch.device | str = "cpu"

    @cached_property
    def space(self) -> LatentSpace | None:
        """Of the latents, read without the autoencoder's weights.

        Raises:
            ConfigError: the autoencoder is not there.
        """
        return None if self.autoencoder_at is None else LatentSpace.of(autoencoder_directory(self.autoencoder_at))

    @cached_property
    def autoencoder(self) -> Autoencoder | None:
        """Loaded when it is first needed.

        Raises:
            ConfigError: it cannot be loaded.
        """
        return None if self.autoencoder_at is None else Autoencoder(self.autoencoder_at, self.device)

    def load(self) -> None:
        """Load the autoencoder now, if there is one.

        Raises:
            ConfigError: it cannot be loaded.
        """
        _ = self.autoencoder

    def on(self, device: torch.device | str) -> Canvas:
        """The same canvas, with its autoencoder on a device; one that is loaded is moved."""
        moved = Canvas(self.resolution, self.autoencoder_at, device)
        if "autoencoder" in self.__dict__ and self.autoencoder is not None:
            loaded = copy(self.autoencoder)
            module: torch.nn.Module = loaded.model
            module.to(device)
            loaded.device = torch.device(device)
            moved.__dict__["autoencoder"] = loaded
        return moved

    @property
    def channels(self) -> int:
        """Of what the network sees."""
        return 3 if self.space is None else self.space.channels

    @property
    def factor(self) -> int:
        """Pixels of a side for one value of what the network sees."""
        return 1 if self.space is None else self.space.factor

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of what the network sees."""
        side = self.resolution // self.factor
        return self.channels, side, side

    @torch.no_grad()
    def pictures(self, x: torch.Tensor) -> torch.Tensor:
        """``[B,3,R,R]`` in -1..1 of what the network made, one after the other.

        A kernel orders its sums by the batch's shape: a picture does not depend on those beside it.
        """
        if self.autoencoder is None:
            return x.clamp(-1, 1)
        return torch.cat([self.autoencoder.decode(row[None]) for row in x]).clamp(-1, 1)

    @torch.no_grad()
    def clean(self, pictures: torch.Tensor) -> torch.Tensor:
        """What the network sees of ``[B,3,R,R]`` pictures in -1..1: the mean of their latents, or themselves."""
        if self.autoencoder is None:
            return pictures
        space = self.autoencoder.space
        moments = torch.cat([self.autoencoder.moments(row[None]) for row in pictures])
        mean, _ = moments.chunk(2, dim=1)
        return (mean - space.shift.to(mean.device)) * space.scale.to(mean.device)
