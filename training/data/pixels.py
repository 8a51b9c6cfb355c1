"""Pixels: from a sample's bytes to a row of a batch, by the shortest way."""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from training.data.augment import PLAIN, AugmentConfig, Cut, Draw, coloured, conditioning, cut, draw, middle, turned
from training.data.dataset import Split
from training.data.decode import decode
from training.data.findings import describe
from training.errors import DarkroomError, DataError

_MARGIN = 2.0
"""A JPEG is decoded at no less than so many times the wanted size."""
_LEAST_REDUCTION = 1.5
"""Decoding at 6/8 or 7/8 of the size is no faster than decoding all of it."""


class Row(NamedTuple):
    """What a row holds beside its values.

    Attributes:
        caption: one line.
        sizes: what SDXL conditions on (see ``augment.conditioning``).
    """

    caption: str
    sizes: tuple[int, ...]


class PixelReader:
    """Writes samples into rows ``[height, width, 3]`` of uint8. Threads may share it.

    A JPEG that needs nothing but decoding is decoded into the row itself. Where it is more than three times as large
    as wanted, it can be decoded at some eighths of its size, for libjpeg leaves out the frequencies that the resizing
    would remove, and then be resized. Photographs then differ by less than half a step of 255 on average from decoding
    all of it; what was encoded is met as closely either way.

    Args:
        split: what to read.
        augment: how samples are varied.
        seed: keys the draws.
        scaled: decode large JPEGs at a fraction of their size.
        cache_mb: memory for rows, in megabytes.

    Attributes:
        dtype: of the rows.
        cache_bytes: the most that kept rows take.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self, split: Split, augment: AugmentConfig, *, seed: int, scaled: bool = True, cache_mb: int = 0
    ) -> None:
        self._split, self._augment, self._seed, self._scaled = split, augment, seed, scaled
        records = np.asarray(split.records)  # still mapped, and quicker to look things up in
        self._direct, self._widths, self._heights = records["direct"], records["width"], records["height"]
        self._colours = augment.colours
        self._varies = bool(augment.flip) or augment.moves or augment.colours
        self._cache: dict[int, tuple[np.ndarray, str, Cut]] = {}
        self.cache_bytes = 0 if augment.moves else cache_mb * 1_000_000  # a cut that moves is no use a second time
        self._room = self.cache_bytes
        self._lock = threading.Lock()

    def row_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Of a row of pictures of this size, channels last."""
        return height, width, 3

    def read(self, sample_id: int, epoch: int, row: np.ndarray) -> Row:
        """Fill a row with a sample.

        Raises:
            DataError: the sample is damaged.
            StorageError: storage answers with errors.
        """
        drawn = draw(self._augment, self._seed, epoch, sample_id) if self._varies else PLAIN
        target = (row.shape[1], row.shape[0])
        cached = self._cache.get(sample_id)
        if cached is None:
            data, caption = self._split.encoded_with_caption(sample_id)
            try:
                place = self._fill(row, data, sample_id, target, drawn)
            except (DarkroomError, MemoryError):  # a process without memory says nothing about the sample
                raise
            except Exception as error:
                raise DataError(
                    "A sample cannot be read.", value=f"{self._split.name}[{sample_id}]", rule=describe(error)
                ) from error
            self._keep(sample_id, row, caption, place)
        else:
            row[:], caption, place = cached
        if self._colours:
            row[:] = np.asarray(coloured(Image.fromarray(row), drawn))
        if drawn.flip:
            row[:] = row[:, ::-1].copy()
        return Row(caption, conditioning(place, target, drawn))

    def _keep(self, sample_id: int, row: np.ndarray, caption: str, place: Cut) -> None:
        # whole epochs go by between two uses of a sample: evicting the oldest would evict what is needed next
        with self._lock:
            if self._room < row.nbytes or sample_id in self._cache:
                return
            self._room -= row.nbytes
        self._cache[sample_id] = (row.copy(), caption, place)

    def _fill(self, row: np.ndarray, data: memoryview, sample_id: int, target: tuple[int, int], drawn: Draw) -> Cut:
        if not self._direct[sample_id]:
            picture = decode(bytes(data), self._split.background)
            place = cut(picture.size, target, drawn)
            _resized(row, picture, place, target, drawn)
            return place
        # strictly, as it was when it was cleaned: what libjpeg warns of is damage
        size = (int(self._widths[sample_id]), int(self._heights[sample_id]))
        place = middle(size, target) if drawn is PLAIN else cut(size, target, drawn)
        if size == target and drawn.zoom == 1 and not drawn.angle:
            _require_size(simplejpeg.decode_jpeg(data, buffer=row), target)
            return place
        least = self._least(place)
        # with a fourth byte per pixel, for that is how Pillow keeps pictures: it then need not copy them
        samples = simplejpeg.decode_jpeg(
            data, "RGBX", min_width=least[0], min_height=least[1], min_factor=_LEAST_REDUCTION
        )
        factor = _eighths(size, samples)
        picture = Image.frombuffer("RGBX", (samples.shape[1], samples.shape[0]), samples, "raw", "RGBX", 0, 1)
        left, top, right, bottom = (factor * edge for edge in place.box)
        box = (left, top, min(right, picture.width), min(bottom, picture.height))
        _resized(row, picture, Cut(picture.size, box, place.shape), target, drawn)
        return place

    def _least(self, place: Cut) -> tuple[int, int]:
        """The smallest size at which the picture may be decoded; 0 for its own."""
        if not self._scaled:
            return 0, 0
        left, _, right, _ = place.box
        factor = _MARGIN * place.shape[0] / (right - left)
        return math.ceil(factor * place.size[0]), math.ceil(factor * place.size[1])


def _eighths(size: tuple[int, int], samples: np.ndarray) -> float:
    """By what libjpeg has scaled a picture of ``size``: some eighths, its sides rounded up.

    Raises:
        ValueError: the picture is of another size.
    """
    longer = max(size)
    eighths = int(8 * max(samples.shape[:2]) // longer)
    _require_size(samples, (-(-size[0] * eighths // 8), -(-size[1] * eighths // 8)))
    return eighths / 8


def _require_size(samples: np.ndarray, size: tuple[int, int]) -> None:
    if samples.shape[:2] != (size[1], size[0]):
        raise ValueError(f"it has {samples.shape[1]} x {samples.shape[0]} pixels where the index says {size}")


def _resized(row: np.ndarray, picture: Image.Image, place: Cut, target: tuple[int, int], drawn: Draw) -> None:
    """Cut, resize with Lanczos (antialiased: its support grows with the reduction) and turn."""
    left, top, right, bottom = place.box
    if (left, top, right - left, bottom - top) != (0.0, 0.0, *place.shape):
        picture = picture.resize(place.shape, Image.Resampling.LANCZOS, box=place.box)
    if drawn.angle:
        picture = turned(picture, target, drawn.angle)
    row[:] = np.asarray(picture)[:, :, :3]
