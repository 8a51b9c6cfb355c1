"""Contact sheets: layout, captions, refusals."""

import numpy as np
import pytest
from PIL import Image

from training.errors import UsageError
from training.evaluate.contact_sheet import contact_sheet


def _pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (32, 32), (40 * n % 256, 90, 200 - 20 * n)) for n in range(count)]


def test_pictures_stand_in_rows_with_ink_below() -> None:
    sheet = contact_sheet(_pictures(5), ["a red robot face"] * 5, columns=3, cell_px=64)
    pixels = np.asarray(sheet)
    assert sheet.width == 3 * (64 + 6) + 6
    assert tuple(pixels[6 + 32, 6 + 32]) == (0, 90, 200)
    below = pixels[6 + 64 : 6 + 64 + 20, 6 : 6 + 64]
    assert (below < 100).any(), "the caption is drawn below its picture"


def test_captions_stay_inside_their_cells() -> None:
    caption = "supercalifragilisticexpialidocious face with very many adjectives, and then some"
    sheet = contact_sheet(_pictures(2), [caption, ""], columns=2, cell_px=64)
    pixels = np.asarray(sheet)
    assert (pixels[:, 6 + 64 + 1 : 6 + 64 + 5] == 250).all(), "nothing runs into the gap between cells"


def test_transparency_and_other_sizes() -> None:
    pictures = [Image.new("RGBA", (300, 10), (0, 0, 0, 0)), Image.new("L", (1, 900), 7), Image.new("P", (5, 5))]
    assert contact_sheet(pictures, ["", "é", "日本"], cell_px=48).mode == "RGB"


@pytest.mark.parametrize(
    ("count", "captions", "columns", "said"),
    [(0, 0, 8, "at least one picture"), (2, 1, 8, "one caption per picture"), (1, 1, 0, "columns >= 1")],
)
def test_refusals(count: int, captions: int, columns: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        contact_sheet(_pictures(count), ["x"] * captions, columns=columns)
