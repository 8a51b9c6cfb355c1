"""From bytes to a row: the same pixels as the plain way, or close to them and much faster."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from tests.benchmarks.loader_data import photo
from training.data.augment import AugmentConfig, draw
from training.data.build import build
from training.data.config import BuildConfig
from training.data.dataset import Dataset, Split
from training.data.decode import decode, square
from training.data.pixels import PixelReader
from training.errors import DataError

PLAIN = AugmentConfig()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Pictures like photographs, as JPEGs of several sizes, and as a PNG, a grey JPEG and a turned one."""
    folder = tmp_path_factory.mktemp("photos")
    for number, side in enumerate([96, 240, 333, 512, 640]):
        (folder / f"{number}.jpg").write_bytes(photo(side, number))
    wide = [Image.open(io.BytesIO(photo(512, number))).crop((0, 100, 512, 301)) for number in range(5, 9)]
    wide[0].save(folder / "5.jpg", quality=90)
    wide[1].save(folder / "6.png")
    wide[2].convert("L").save(folder / "7.jpg", quality=90)
    turned = Image.Exif()
    turned[0x0112] = 6
    wide[3].save(folder / "8.jpg", quality=90, exif=turned)
    out = tmp_path_factory.mktemp("photo-set") / "data"
    build(folder, out, BuildConfig(held_out=0))
    split = Dataset.open(out).split("train")
    assert len(split) == 9
    return split


def rows(split: Split, side: int, **options: bool) -> np.ndarray:
    """All samples as squares."""
    reader = PixelReader(split, PLAIN, seed=0, **options)
    out = np.empty((len(split), *reader.row_shape(side, side)), reader.dtype)
    for number in range(len(split)):
        reader.read(number, 0, out[number])
    return out


def plainly(split: Split, side: int) -> np.ndarray:
    """All samples by the one decoder and the one resizing that cleaning and evaluation use."""
    return np.stack([square(decode(split.encoded(i), split.background), side) for i in range(len(split))])


@pytest.mark.parametrize("side", [96, 240, 64])
def test_exact_decoding_gives_the_same_pixels_as_the_plain_way(photos: Split, side: int) -> None:
    assert np.array_equal(rows(photos, side, scaled=False), plainly(photos, side))


@pytest.mark.parametrize("side", [32, 48, 64, 96, 128])
def test_scaled_decoding_stays_close(photos: Split, side: int) -> None:
    """Closer than one step of 255 on average."""
    exact, scaled = plainly(photos, side).astype(int), rows(photos, side).astype(int)
    for one, other in zip(exact, scaled, strict=True):
        difference = np.abs(one - other)
        assert difference.mean() < 1
        assert difference.max() <= 8
    large = photos.records["direct"].astype(bool) & (photos.records["height"] > 4 * side)
    assert (exact != scaled)[large].any() == large.any(), "what is large is scaled"


def test_a_row_may_be_any_shape(photos: Split) -> None:
    reader = PixelReader(photos, PLAIN, seed=0)
    for number in range(len(photos)):
        row = np.empty(reader.row_shape(96, 48), np.uint8)
        found = reader.read(number, 0, row)
        width, height = photos.picture(number)[0].size
        assert found.sizes[:2] == (height, width)
        assert found.sizes[4:] == (48, 96)
        pixel = min(width / 96, height / 48)
        box = ((width - 96 * pixel) / 2, (height - 48 * pixel) / 2)
        expected = photos.picture(number)[0].resize(
            (96, 48), Image.Resampling.LANCZOS, box=(*box, box[0] + 96 * pixel, box[1] + 48 * pixel)
        )
        assert np.abs(row.astype(int) - np.asarray(expected)).mean() < 1


def test_variation_is_the_samples_own(photos: Split) -> None:
    varied = AugmentConfig(flip=0.5, crop="random", zoom=1.5, rotate_degrees=15, brightness=0.2, contrast=0.2)
    one, other = (PixelReader(photos, varied, seed=3, cache_mb=size) for size in (0, 50))
    row, again = np.empty((2, 64, 64, 3), np.uint8)
    for sample, epoch in [(4, 0), (4, 1), (2, 0), (4, 0)]:
        assert one.read(sample, epoch, row) == other.read(sample, epoch, again)
        assert np.array_equal(row, again)
    first = row.copy()
    one.read(4, 1, row)
    assert not np.array_equal(first, row)


def test_what_is_kept_is_mirrored_and_coloured_anew(photos: Split) -> None:
    varied = AugmentConfig(flip=0.5, saturation=0.5)
    fresh, kept = PixelReader(photos, varied, seed=0), PixelReader(photos, varied, seed=0, cache_mb=50)
    row, again = np.empty((2, 64, 64, 3), np.uint8)
    mirrored = set()
    for epoch in range(8):
        assert fresh.read(1, epoch, row) == kept.read(1, epoch, again)
        assert np.array_equal(row, again)
        mirrored.add(draw(varied, 0, epoch, 1).flip)
    assert mirrored == {False, True}
    assert len(kept._cache) == 1


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: bytes(len(data)), lambda _: b""])
def test_damaged_bytes_are_an_error_with_a_name(
    photos: Split, damage: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Split.encoded_with_caption

    def damaged(split: Split, index: int) -> tuple[memoryview, str]:
        data, caption = original(split, index)
        return memoryview(damage(bytes(data))), caption

    monkeypatch.setattr(Split, "encoded_with_caption", damaged)
    for number in range(len(photos)):
        with pytest.raises(DataError, match=rf"train\[{number}\]"):
            PixelReader(photos, PLAIN, seed=0).read(number, 0, np.empty((64, 64, 3), np.uint8))


def test_an_index_that_lies_about_a_size_is_damage(photos: Split) -> None:
    reader = PixelReader(photos, PLAIN, seed=0)
    number = next(i for i in range(9) if photos.records["width"][i] == 240)
    reader._widths, reader._heights = (np.full(9, 64, np.uint32) for _ in range(2))
    with pytest.raises(DataError, match="pixels where the index says"):
        reader.read(number, 0, np.empty((32, 32, 3), np.uint8))
    with pytest.raises(DataError, match="too small"):
        reader.read(number, 0, np.empty((64, 64, 3), np.uint8))
