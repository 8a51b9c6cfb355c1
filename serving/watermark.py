"""An invisible mark in the pixels that names the model, for pictures whose file lost everything else.

A tile of band-limited noise is laid over the whole picture, under the threshold of sight, and found again by folding
the picture at the tile's period and correlating phases: Kalker, Depovere, Haitsma and Maes 1999, "A video watermarking
system for broadcast monitoring" (JAWS), with the periods of shrunk and enlarged pictures searched for as well. Three
noise patterns share the tile; how far the second and the third are shifted against the first is the payload.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import uniform_filter

from training import noise

TILE = 128
"""Period of the mark, in pixels."""
MIN_SIDE = 256
"""Shorter pictures hold too little of the mark to find it again after JPEG."""
PAYLOAD_BITS = 24
"""Two shifts of two coordinates of six bits."""
FALSE_POSITIVES = 1e-6
"""Share of unmarked pictures that are taken for marked ones, at most, whatever they show."""
_PATTERNS = 3
_CELLS = TILE // 2
"""Shifts lie on every second pixel, so that a peak that is one pixel off is read the same."""
_BAND = (6, 34)
"""Cycles per tile: above what pictures are full of, below what JPEG throws away first."""
_SEARCHED_SIDE = 384
"""As much of a large picture's middle is looked at; it holds enough of the mark."""
_SCALES = (0.5, 2.0)
"""Smallest and largest enlargement that is looked for."""
_NEAR = 1.05
"""A mark shows, weakly and sometimes misread, at scales that are off by less than this."""

Floats = NDArray[np.float32]
Complexes = NDArray[np.complex64]


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
        payload: the 24 bits, as six hexadecimal digits; None where there is no mark.
        score: standard deviations of the correlation above that of an unmarked picture.
        false_positive: at most this share of unmarked pictures scores as high in a search like this one.
        scale: by how much the picture was enlarged since it was marked.
    """

    payload: str | None
    score: float
    false_positive: float
    scale: float


def too_small(width: int, height: int) -> str | None:
    """Why a picture of this size, in pixels, cannot be marked; None where it can."""
    if min(width, height) >= MIN_SIDE:
        return None
    return f"{width}x{height} pixels: a mark needs {MIN_SIDE} on both sides to be found again"


def embed(image: Image.Image, payload: str, strength: float) -> Image.Image:
    """The marked picture: the same input gives the same output.

    Args:
        image: RGB, at least ``MIN_SIDE`` pixels on both sides.
        payload: six hexadecimal digits.
        strength: root mean square of the mark in busy places, in grey levels; half of it in flat ones.
    """
    pixels = np.asarray(image.convert("RGB"), np.float32)
    height, width = pixels.shape[:2]
    mark = np.tile(_tile(int(payload, 16)), (-(-height // TILE), -(-width // TILE)))[:height, :width]
    mark = mark * (strength * _visibility(pixels.mean(axis=2)))
    marked = np.clip(np.rint(pixels + mark[..., None]), 0, 255).astype(np.uint8)
    return Image.fromarray(marked, "RGB")


def find(image: Image.Image) -> Found:
    """Look for a mark: first at its own size, then as if the picture was resized by ``0.5`` to ``2``.

    Both searches may be wrong on half of ``FALSE_POSITIVES``. The bound holds for every picture, over the draw of the
    noise: a score is a sum of cosines of independent even phases, whose tail is at most ``exp(-score^2 / 2)``
    (``E exp(t cos) = I0(t) <= exp(t^2 / 4)``), times the number of shifts and scales that were tried.

    Args:
        image: RGB of any size; of a larger one the middle 384x384 pixels are read.
    """
    residual = _residual(_middle(image))
    best = Found(None, 0.0, 1.0, 1.0)
    for scales in ([1.0], _scales(max(residual.shape))):
        for scale in scales:
            _, score = _match(residual, scale)
            bound = _bound(score, len(scales))
            if bound <= FALSE_POSITIVES:
                return _read(residual, [other for other in scales if scale <= other < _NEAR * scale], len(scales))
            best = Found(None, score, bound, scale) if score > best.score else best
    return best


def _read(residual: Floats, scales: list[float], tried: int) -> Found:
    """The mark at the best of the scales that follow the first at which it shows."""
    matches = {scale: _match(residual, scale) for scale in scales}
    scale = max(matches, key=lambda other: matches[other][1])
    payload, score = matches[scale]
    return Found(f"{payload:0{PAYLOAD_BITS // 4}x}", score, _bound(score, tried), scale)


def _bound(score: float, scales: int) -> float:
    """The share of unmarked pictures that reach a score: both searches' shifts times the tail of one."""
    tries = 2.0 * scales * TILE**2 * _CELLS ** (2 * (_PATTERNS - 1))
    return min(1.0, math.exp(math.log(tries) - score**2 / 2))


def _match(residual: Floats, scale: float) -> tuple[int, float]:
    """Payload and score of the best shifts."""
    seen = _folded(residual, TILE * scale)
    seen /= np.maximum(np.abs(seen), np.float32(1e-12))
    norm = math.sqrt(2 / np.count_nonzero(_half_band()))
    # [pattern, y, x]: correlation in standard deviations, for every shift of the pattern
    peaks = np.fft.irfft2(seen * _phases().conj(), s=(TILE, TILE)) * (TILE**2 / 2 * norm)
    best = (0, 0.0)
    for parity_y, parity_x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        classes = peaks[:, parity_y::2, parity_x::2].reshape(_PATTERNS, -1)
        places = classes.argmax(axis=1)
        score = float(classes.max(axis=1).sum()) / math.sqrt(_PATTERNS)
        if score > best[1]:
            y, x = np.divmod(places, _CELLS)
            shifts = [int(part) for k in (1, 2) for part in ((y[k] - y[0]) % _CELLS, (x[k] - x[0]) % _CELLS)]
            payload = sum(shift << (6 * place) for place, shift in enumerate(shifts))
            best = (payload, score)
    return best


def _folded(residual: Floats, period: float) -> Complexes:
    """The picture's spectrum at the harmonics of a period in pixels, ``[TILE, TILE // 2 + 1]``; 0 outside the band.

    Folding at a period that is no whole number is reading the spectrum between its own lines.
    """
    height, width = residual.shape
    reach = _BAND[1]
    across = _waves(width, np.arange(reach + 1), period)
    down = _waves(height, np.arange(-reach, reach + 1), period)
    inner = down @ (residual @ across.T.real + 1j * (residual @ across.T.imag))
    spectrum = np.zeros((TILE, TILE // 2 + 1), np.complex64)
    spectrum[np.arange(-reach, reach + 1)[:, None], np.arange(reach + 1)] = inner
    spectrum[~_half_band()] = 0
    return spectrum


def _waves(length: int, harmonics: NDArray[np.int64], period: float) -> Complexes:
    phase = np.outer(harmonics, np.arange(length) + 0.5) * (-2 * math.pi / period)
    waves: Complexes = np.exp(1j * phase).astype(np.complex64)
    return waves


@cache
def _half_band() -> NDArray[np.bool_]:
    """Which harmonics carry the mark, each once: of a real picture's spectrum one half tells the other."""
    y = np.fft.fftfreq(TILE, 1 / TILE)[:, None]
    x = np.arange(TILE // 2 + 1)[None]
    radius = np.hypot(y, x)
    inside: NDArray[np.bool_] = (radius >= _BAND[0]) & (radius <= _BAND[1]) & ((x > 0) | (y > 0))
    return inside


@cache
def _phases() -> Complexes:
    """``[pattern, TILE, TILE // 2 + 1]``: unit phases inside the band, 0 outside; independent and even."""
    angles = noise.generator(0, "watermark", 1).random((_PATTERNS, TILE, TILE // 2 + 1)) * (2 * math.pi)
    phases: Complexes = np.where(_half_band(), np.exp(1j * angles), 0).astype(np.complex64)
    return phases


def _tile(payload: int) -> Floats:
    """``[TILE, TILE]`` of mean 0 and variance 1 that holds the payload."""
    shifts = [(payload >> (6 * place)) % _CELLS for place in range(4)]
    patterns = np.fft.irfft2(_phases(), s=(TILE, TILE))
    first, second, third = patterns
    mark = first + np.roll(second, (2 * shifts[0], 2 * shifts[1]), (0, 1))
    mark = mark + np.roll(third, (2 * shifts[2], 2 * shifts[3]), (0, 1))
    tile: Floats = (mark / mark.std()).astype(np.float32)
    return tile


def _visibility(luma: Floats) -> Floats:
    """0.5..1.5: what a busy place hides, a flat one shows."""
    gain: Floats = np.clip(0.5 + _deviation(luma) / 16, 0.5, 1.5)
    return gain


def _residual(image: Image.Image) -> Floats:
    """``[H,W]``: what is left of the lightness once every place has mean 0 and about the same contrast."""
    luma = np.asarray(image.convert("RGB"), np.float32).mean(axis=2)
    flat = luma - uniform_filter(luma, 9, mode="reflect")
    residual: Floats = (flat / (_deviation(luma) + 2)).astype(np.float32)
    return residual


def _deviation(luma: Floats) -> Floats:
    mean = uniform_filter(luma, 9, mode="reflect")
    deviation: Floats = np.sqrt(np.maximum(uniform_filter(luma**2, 9, mode="reflect") - mean**2, 0))
    return deviation


def _middle(image: Image.Image) -> Image.Image:
    width, height = image.size
    left, top = max(0, width - _SEARCHED_SIDE) // 2, max(0, height - _SEARCHED_SIDE) // 2
    return image.crop((left, top, min(width, left + _SEARCHED_SIDE), min(height, top + _SEARCHED_SIDE)))


def _scales(side: int) -> list[float]:
    """Enlargements so close that the finest wave drifts by less than a sixth at the picture's edge."""
    step = TILE / (3 * _BAND[1] * side)
    count = math.ceil(math.log(_SCALES[1] / _SCALES[0]) / math.log1p(step))
    return [float(scale) for scale in np.geomspace(*_SCALES, count)]
