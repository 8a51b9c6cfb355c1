"""Augmentation: keyed draws, cuts inside the picture, and the colours that were asked for."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from training.data.augment import PLAIN, AugmentConfig, Draw, coloured, conditioning, cut, draw, turned

ALL = AugmentConfig(flip=0.5, rotate_degrees=20, crop="random", zoom=2, brightness=0.3, contrast=0.3, saturation=0.3)
sides = st.integers(1, 3000)
draws = st.builds(
    Draw,
    flip=st.booleans(),
    angle=st.floats(-math.pi / 4, math.pi / 4),
    zoom=st.floats(1, 4),
    across=st.floats(0, 1),
    down=st.floats(0, 1),
)


def test_without_a_word_nothing_is_varied() -> None:
    assert draw(AugmentConfig(), 1, 2, 3) is PLAIN
    assert not AugmentConfig().moves
    assert not AugmentConfig().colours


def test_a_draw_belongs_to_seed_epoch_and_sample() -> None:
    assert draw(ALL, 1, 2, 3) == draw(ALL, 1, 2, 3)
    assert len({draw(ALL, *key) for key in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)]}) == 4


def test_one_option_does_not_move_the_draws_of_another() -> None:
    everything, flips = draw(ALL, 0, 5, 7), draw(AugmentConfig(flip=0.5), 0, 5, 7)
    assert everything.flip == flips.flip
    assert (flips.angle, flips.zoom, flips.across) == (0, 1, 0.5)


def test_draws_fill_their_ranges() -> None:
    drawn = [draw(ALL, 0, 0, sample) for sample in range(2000)]
    for name, low, high in [
        ("angle", -math.radians(20), math.radians(20)),
        ("zoom", 1, 2),
        ("across", 0, 1),
        ("down", 0, 1),
        ("brightness", 0.7, 1.3),
        ("contrast", 0.7, 1.3),
        ("saturation", 0.7, 1.3),
    ]:
        values = np.array([getattr(each, name) for each in drawn])
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
    assert 0.45 < np.mean([each.flip for each in drawn]) < 0.55


@given(sides, sides, st.integers(1, 512), st.integers(1, 512), draws)
@settings(max_examples=500)
def test_every_cut_lies_in_the_picture_and_has_the_shape(
    width: int, height: int, across: int, down: int, drawn: Draw
) -> None:
    made = cut((width, height), (across, down), drawn)
    left, top, right, bottom = made.box
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    if drawn.angle == 0:
        assert made.shape == (across, down)
        assert (right - left) / (bottom - top) == pytest.approx(across / down, rel=1e-6)
    else:
        assert made.shape[0] >= min(across, down) * math.cos(math.pi / 4)
    if drawn.zoom == 1 and drawn.angle == 0:  # as large as it can be
        assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height)


def test_conditioning_is_in_pixels_of_the_resized_picture() -> None:
    plain = cut((400, 200), (100, 100), PLAIN)
    assert conditioning(plain, (100, 100), PLAIN) == (200, 400, 0, 50, 100, 100)
    left = Draw(across=0.0)
    assert conditioning(cut((400, 200), (100, 100), left), (100, 100), left) == (200, 400, 0, 0, 100, 100)
    mirrored = Draw(across=0.0, flip=True)  # what was at the left is at the right now
    assert conditioning(cut((400, 200), (100, 100), mirrored), (100, 100), mirrored)[3] == 100


def test_turning_leaves_no_corner_empty() -> None:
    white = Image.new("RGB", (300, 200), "white")
    for degrees in (-45, -20, 3, 45):
        drawn = Draw(angle=math.radians(degrees))
        made = cut(white.size, (64, 48), drawn)
        picture = white.resize(made.shape, Image.Resampling.LANCZOS, box=made.box)
        assert np.array(turned(picture, (64, 48), drawn.angle)).min() == 255


def test_a_quarter_turns_counter_clockwise() -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, 16:] = 255  # the right half is white
    up = np.array(turned(Image.fromarray(pixels), (32, 32), math.pi / 2))
    assert up[:15].min() == 255
    assert up[17:].max() == 0


def test_colours_move_as_asked() -> None:
    pixels = np.random.default_rng(0).integers(60, 180, (16, 16, 3)).astype(np.uint8)
    picture, values = Image.fromarray(pixels), pixels.astype(float)
    grey = values @ np.array([0.299, 0.587, 0.114])
    mean = values.mean((0, 1)) @ np.array([0.299, 0.587, 0.114])
    for drawn, expected in [
        (Draw(), values),
        (Draw(brightness=1.3), 1.3 * values),
        (Draw(contrast=0.5), mean + 0.5 * (values - mean)),
        (Draw(saturation=0.0), np.repeat(grey[..., None], 3, 2)),
        (Draw(saturation=1.4), grey[..., None] + 1.4 * (values - grey[..., None])),
    ]:
        found = np.array(coloured(picture, drawn)).astype(float)
        assert np.abs(found - expected.clip(0, 255)).max() <= 1.2  # the mean is rounded, and the result


@pytest.mark.parametrize("options", [{"flip": 2}, {"zoom": 0.5}, {"rotate_degrees": 90}, {"contrast": 1}])
def test_what_makes_no_picture_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        AugmentConfig(**options)  # type: ignore[arg-type]
