"""Contact sheets: a grid of pictures, each with its caption below it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from training.errors import UsageError

_BACKGROUND = (250, 250, 250)
_INK = (30, 30, 30)
_GAP_PX = 6
_LINES = 2


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], *, columns: int = 8, cell_px: int = 96
) -> Image.Image:
    """Pictures in rows of ``columns``, with their captions below, wrapped to two lines and then cut with "...".

    Args:
        images: pictures of any size; each is scaled to fit its cell, small ones with hard pixel edges.
        captions: one per picture; ``""`` leaves the space below empty.
        columns: cells in a row; fewer where there are fewer pictures.
        cell_px: side of a cell in pixels, captions not included.

    Returns:
        An RGB picture.

    Raises:
        UsageError: no pictures, another number of captions than pictures, or a cell or row without room.
    """
    _check(len(images), len(captions), columns, cell_px)
    font = ImageFont.load_default(size=max(9, min(16, cell_px // 9)))
    line_px = math.ceil(font.getbbox("Âgj")[3]) + 1
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    step_x, step_y = cell_px + _GAP_PX, cell_px + _LINES * line_px + 2 * _GAP_PX
    sheet = Image.new("RGB", (columns * step_x + _GAP_PX, rows * step_y + _GAP_PX), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = _GAP_PX + number % columns * step_x, _GAP_PX + number // columns * step_y
        fitted = _fit(image, cell_px)
        sheet.paste(fitted, (x + (cell_px - fitted.width) // 2, y + (cell_px - fitted.height) // 2))
        for row, line in enumerate(_wrap(caption, font, cell_px)):
            left = x + (cell_px - font.getlength(line)) / 2
            draw.text((left, y + cell_px + _GAP_PX // 2 + row * line_px), line, fill=_INK, font=font)
    return sheet


def _check(images: int, captions: int, columns: int, cell_px: int) -> None:
    if not images:
        raise UsageError("A contact sheet needs pictures.", value=images, rule="at least one picture")
    if images != captions:
        raise UsageError(
            f"{images} pictures came with {captions} captions.", value=captions, rule="one caption per picture"
        )
    if columns < 1 or cell_px < 16:
        raise UsageError(
            "The contact sheet has no room.", value=(columns, cell_px), rule="columns >= 1 and cell_px >= 16"
        )


def _fit(image: Image.Image, side: int) -> Image.Image:
    """Scaled to fit; transparent pixels show the sheet's background."""
    picture = image.convert("RGBA")
    backed = Image.alpha_composite(Image.new("RGBA", picture.size, (*_BACKGROUND, 255)), picture).convert("RGB")
    scale = side / max(backed.size)
    size = (max(1, round(backed.width * scale)), max(1, round(backed.height * scale)))
    # a model's small pictures are shown as they are: smoothing would flatter them
    return backed.resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)


def _wrap(caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> list[str]:
    """At most two lines that fit; words wider than a line are split."""
    lines, line = [], ""
    for word in caption.split():
        joined = f"{line} {word}".strip()
        if font.getlength(joined) <= width_px:
            line = joined
            continue
        if line:
            lines.append(line)
        line = word
        while font.getlength(line) > width_px:
            cut = next(n for n in range(len(line) - 1, 0, -1) if n == 1 or font.getlength(line[:n]) <= width_px)
            lines.append(line[:cut])
            line = line[cut:]
    lines.append(line)
    if len(lines) <= _LINES:
        return lines
    last = lines[_LINES - 1]
    while last and font.getlength(last + "...") > width_px:
        last = last[:-1]
    return [*lines[: _LINES - 1], last.rstrip(" ,.") + "..."]
