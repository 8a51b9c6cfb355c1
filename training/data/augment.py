"""Augmentation: what is drawn for a sample, and the geometry and colour that follow. Nothing here decodes."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from training import noise

_GREY = np.array([0.299, 0.587, 0.114])
"""Luma weights of ITU-R BT.601."""


class AugmentConfig(BaseModel):
    """How training pictures are varied; all of it is off unless a recipe says otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    flip: float = Field(default=0.0, ge=0, le=1)
    """Chance of mirroring left and right; 0 where letters or hands matter."""
    rotate_degrees: float = Field(default=0.0, ge=0, le=45)
    """Largest angle, either way; the cut shrinks with it, so that no corner is empty."""
    crop: Literal["centre", "random"] = "centre"
    """Where the cut lies in the picture."""
    zoom: float = Field(default=1.0, ge=1, le=4)
    """The cut is up to so many times smaller than it could be."""
    brightness: float = Field(default=0.0, ge=0, lt=1)
    """Colours are multiplied by up to 1 plus or minus this."""
    contrast: float = Field(default=0.0, ge=0, lt=1)
    """The distance from the picture's mean grey is multiplied by up to 1 plus or minus this."""
    saturation: float = Field(default=0.0, ge=0, lt=1)
    """The distance from each pixel's own grey is multiplied by up to 1 plus or minus this."""

    @property
    def moves(self) -> bool:
        """The same picture is cut differently in different epochs."""
        return bool(self.rotate_degrees) or self.crop != "centre" or self.zoom > 1

    @property
    def colours(self) -> bool:
        """The same picture has different colours in different epochs."""
        return bool(self.brightness or self.contrast or self.saturation)


@dataclass(frozen=True, slots=True)
class Draw:
    """What is drawn for one sample in one epoch.

    Attributes:
        flip: mirror left and right.
        angle: radians, counter-clockwise.
        zoom: 1 or more.
        across: place of the cut between left, 0, and right, 1.
        down: between top, 0, and bottom, 1.
        brightness: a factor.
        contrast: a factor.
        saturation: a factor.
    """

    flip: bool = False
    angle: float = 0.0
    zoom: float = 1.0
    across: float = 0.5
    down: float = 0.5
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0


PLAIN = Draw()
"""The middle of the picture as it is."""


def draw(config: AugmentConfig, seed: int, epoch: int, sample_id: int) -> Draw:
    """The draw of a sample, the same on any rank of any world; no option moves the draws of another."""
    if not (config.flip or config.moves or config.colours):
        return PLAIN
    u = noise.generator(seed, epoch, sample_id, "augment").random(8)
    anywhere = config.crop == "random"
    return Draw(
        flip=bool(u[0] < config.flip),
        angle=math.radians(config.rotate_degrees) * (2 * u[1] - 1),
        zoom=config.zoom ** u[2],  # even in the logarithm: twice as near is as likely as twice as near again
        across=u[3] if anywhere else 0.5,
        down=u[4] if anywhere else 0.5,
        brightness=1 + config.brightness * (2 * u[5] - 1),
        contrast=1 + config.contrast * (2 * u[6] - 1),
        saturation=1 + config.saturation * (2 * u[7] - 1),
    )


@dataclass(frozen=True, slots=True)
class Cut:
    """Where in a picture of ``size`` a shape is cut.

    Attributes:
        size: width and height of the picture.
        box: left, top, right, bottom in its pixels, fractions allowed.
        shape: width and height that the box is resized to; larger than the target where it is turned afterwards.
    """

    size: tuple[int, int]
    box: tuple[float, float, float, float]
    shape: tuple[int, int]


def cut(size: tuple[int, int], target: tuple[int, int], draw: Draw) -> Cut:
    """Where a sample is cut.

    Args:
        size: width and height of the picture.
        target: width and height of the row.
        draw: zoom, place and angle.
    """
    width, height = size
    cosine, sine = abs(math.cos(draw.angle)), abs(math.sin(draw.angle))
    # the upright box around the turned target
    across, down = target[0] * cosine + target[1] * sine, target[0] * sine + target[1] * cosine
    pixel = min(width / across, height / down) / draw.zoom  # pixels of the picture per pixel of the row
    box_width, box_height = min(pixel * across, width), min(pixel * down, height)  # no rounding may leave the picture
    left, top = (width - box_width) * draw.across, (height - box_height) * draw.down
    shape = target if not draw.angle else (math.ceil(across), math.ceil(down))
    return Cut(size, (left, top, min(left + box_width, width), min(top + box_height, height)), shape)


@functools.lru_cache(maxsize=1024)
def middle(size: tuple[int, int], target: tuple[int, int]) -> Cut:
    """The cut of a sample that is not varied; many have one size."""
    return cut(size, target, PLAIN)


def conditioning(cut: Cut, target: tuple[int, int], draw: Draw) -> tuple[int, ...]:
    """What SDXL conditions on (Podell et al. 2023, section 2.2).

    Returns:
        Height and width of the picture, top and left of the cut in the picture resized so that the cut has the
        target's size, as it is seen after flipping, and height and width of the target; pixels.
    """
    left, top, right, _ = cut.box
    scale = cut.shape[0] / (right - left)
    shown = cut.size[0] - right if draw.flip else left
    return (cut.size[1], cut.size[0], round(top * scale), round(shown * scale), target[1], target[0])


def turned(picture: Image.Image, target: tuple[int, int], angle: float) -> Image.Image:
    """The middle of an RGB picture, turned counter-clockwise about its centre."""
    cosine, sine = math.cos(angle), math.sin(angle)
    x, y = picture.width / 2, picture.height / 2
    # Pillow asks where each pixel of the result comes from
    matrix = (
        cosine,
        -sine,
        x - cosine * target[0] / 2 + sine * target[1] / 2,
        sine,
        cosine,
        y - sine * target[0] / 2 - cosine * target[1] / 2,
    )
    return picture.transform(target, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


def coloured(picture: Image.Image, draw: Draw) -> Image.Image:
    """Brightness, contrast and saturation of an RGB picture, in this order, as one affine map of its colours."""
    mean = float(np.array(picture.resize((1, 1), Image.Resampling.BOX), dtype=np.float64).reshape(3) @ _GREY)
    mixed = draw.saturation * np.eye(3) + (1 - draw.saturation) * np.tile(_GREY, (3, 1))
    matrix = mixed * draw.brightness * draw.contrast
    offset = np.full((3, 1), (1 - draw.contrast) * mean * draw.brightness)
    return picture.convert("RGB", tuple(np.hstack([matrix, offset]).ravel().tolist()))
