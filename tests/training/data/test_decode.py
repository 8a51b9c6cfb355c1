"""Encoded bytes become the colours that a viewer shows."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from training.data.decode import decode, square

WHITE = (255, 255, 255)


def _encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _pixel(data: bytes, background: tuple[int, int, int] = WHITE, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    decoded = decode(data, background)
    assert decoded.mode == "RGB"
    pixel = decoded.getpixel(at)
    assert isinstance(pixel, tuple)
    return pixel


def _raw_png(depth: int, colour: int, pixel: bytes, transparent: bytes = b"", side: int = 20) -> bytes:
    """A PNG of one colour, as Pillow cannot write it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0))
    keyed = chunk(b"tRNS", transparent) if transparent else b""
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + pixel * side) * side))
    return b"\x89PNG\r\n\x1a\n" + header + keyed + pixels + chunk(b"IEND", b"")


def test_transparency_is_composited_before_resizing() -> None:
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:, 16:] = (0, 0, 255, 255)
    pixels[:, :16, 0] = 255  # red, but invisible
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    small = square(decode(buffer.getvalue(), (0, 255, 0)), 8)
    assert small.shape == (8, 8, 3)
    assert small[..., 0].max() == 0  # no red bleeds in
    assert small[4, 0].tolist() == [0, 255, 0]
    assert small[4, 7].tolist() == [0, 0, 255]


def test_grey_with_alpha_is_composited() -> None:
    data = _encoded(Image.new("LA", (20, 20), (100, 128)))
    assert _pixel(data) == (177, 177, 177)  # 100 * 128/255 + 255 * 127/255
    assert _pixel(data, (0, 0, 0)) == (50, 50, 50)


def test_a_palette_shows_its_colours_and_its_transparent_one() -> None:
    picture = Image.new("P", (20, 20), 0)
    picture.putpalette([200, 10, 20, 0, 250, 0])
    picture.paste(1, (10, 0, 20, 20))
    assert _pixel(_encoded(picture)) == (200, 10, 20)
    keyed = _encoded(picture, transparency=1)
    assert _pixel(keyed, (1, 2, 3), at=(15, 5)) == (1, 2, 3)
    assert _pixel(keyed, (1, 2, 3), at=(5, 5)) == (200, 10, 20)


@pytest.mark.parametrize("ink", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255)])
def test_inks_become_light(ink: tuple[int, int, int, int]) -> None:
    light = tuple((255 - part) * (255 - ink[3]) // 255 for part in ink[:3])
    shown = _pixel(_encoded(Image.new("CMYK", (24, 24), ink), "JPEG", quality=95))
    assert max(abs(one - other) for one, other in zip(shown, light, strict=True)) <= 3


def test_one_bit_and_grey_are_grey() -> None:
    assert _pixel(_encoded(Image.new("1", (20, 20), 1))) == (255, 255, 255)
    assert _pixel(_encoded(Image.new("L", (20, 20), 77))) == (77, 77, 77)


def test_sixteen_bits_are_scaled_to_eight() -> None:
    assert _pixel(_raw_png(16, 0, b"\x80\x00")) == (0x80, 0x80, 0x80)
    assert _pixel(_raw_png(16, 2, b"\x80\x00\x40\x00\xff\xff")) == (0x80, 0x40, 0xFF)
    assert _pixel(_raw_png(16, 4, b"\x80\x00\x00\x00"), (1, 2, 3)) == (1, 2, 3)


def test_the_transparent_grey_of_sixteen_bits_is_transparent() -> None:
    assert _pixel(_raw_png(16, 0, b"\x12\x34", b"\x12\x34"), (1, 2, 3)) == (1, 2, 3)
    # the same upper byte and another lower one is another grey
    assert _pixel(_raw_png(16, 0, b"\x12\x35", b"\x12\x34"), (1, 2, 3)) == (0x12, 0x12, 0x12)


@pytest.mark.parametrize(("orientation", "red_at"), [(1, (3, 3)), (3, (44, 28)), (6, (28, 3)), (8, (3, 44))])
def test_pictures_are_turned_upright(orientation: int, red_at: tuple[int, int]) -> None:
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:8, :8] = (250, 0, 0)  # top left, as the camera held it
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _encoded(Image.fromarray(pixels), "JPEG", exif=exif, quality=95, subsampling=0)
    turned = decode(data, WHITE)
    assert turned.size == ((48, 32) if orientation in {1, 3} else (32, 48))
    corners = {(x, y): np.asarray(turned)[y, x, 0] for x in (3, turned.width - 4) for y in (3, turned.height - 4)}
    assert [corner for corner, red in corners.items() if red > 200] == [red_at]


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})])
def test_of_an_animation_the_first_frame_counts(kind: str, options: dict[str, object]) -> None:
    first, second = Image.new("RGB", (20, 20), (250, 0, 0)), Image.new("RGB", (20, 20), (0, 0, 250))
    data = _encoded(first, kind, save_all=True, append_images=[second], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    assert _pixel(data) == (250, 0, 0)


def test_the_centre_of_a_picture_that_is_not_square_is_kept() -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    assert np.unique(square(Image.fromarray(pixels), 10)).tolist() == [200]
