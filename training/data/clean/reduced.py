"""A picture averaged down once, so that all that is measured of it costs a fraction of decoding."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

WORKING_PX = 256
"""The shorter side at which pictures are compared; smaller pictures keep theirs."""


@dataclass(frozen=True, slots=True)
class Reduced:
    """A picture reduced by a whole factor, its shorter side at ``WORKING_PX`` or more, if it was.

    Attributes:
        image: the averages; the last row and column may stand for less than a whole factor.
        box: left, top, right and bottom of the picture within ``image``, which need not be whole: a shift by
            a hundredth of the picture would show in a thumbnail.
    """

    image: Image.Image
    box: tuple[float, float, float, float]

    @classmethod
    def of(cls, picture: Image.Image) -> Reduced:
        """Reduce a picture."""
        factor = max(1, min(picture.size) // WORKING_PX)
        box = (0.0, 0.0, picture.width / factor, picture.height / factor)
        return cls(picture.reduce(factor) if factor > 1 else picture, box)

    def squeezed(self, side: int, filter_: Image.Resampling = Image.Resampling.BILINEAR, gap: float = 1) -> Image.Image:
        """The whole picture as RGB in a square of ``side`` pixels, whatever its shape.

        Args:
            side: pixels.
            filter_: of the resize.
            gap: how much is left to the filter after fast averaging; more is slower and nearer to the filter alone.
        """
        return self.image.resize((side, side), filter_, box=self.box, reducing_gap=gap).convert("RGB")

    def lightness(self, side: int) -> Image.Image:
        """The picture in grey with its shorter side at ``side``, each pixel the mean of its area; never enlarged."""
        grey = self.image.convert("L")
        width, height = self.box[2:]
        scale = side / min(width, height)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        return grey if scale >= 1 else grey.resize(size, Image.Resampling.BOX, box=self.box)
