"""What is written into the shards: the bytes as they came, or one kind of JPEG."""

from __future__ import annotations

import io
from typing import Annotated, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from training.data.decode import RGB, Facts, decode


class OriginalStore(BaseModel):
    """Pictures are stored byte for byte."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["original"] = "original"
    """Nothing is encoded again."""


class JpegStore(BaseModel):
    """Pictures are stored as upright sRGB JPEGs, made smaller where they are larger than wanted.

    Everything that needs more than the fastest decoder is done once: profiles, transparency, orientation, other
    formats. JPEG loses a little each time; a sound upright sRGB JPEG that is small enough is therefore left as it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["jpeg"] = "jpeg"
    """Encoded again where needed."""
    quality: int = Field(default=92, ge=1, le=100)
    """Of libjpeg; from 90 on, colours are kept at full detail."""
    max_side_px: int | None = Field(default=None, ge=16)
    """The shorter side is reduced to this, never enlarged; trainers resize the shorter side, too."""


StoreConfig = Annotated[OriginalStore | JpegStore, Field(discriminator="kind")]

_FULL_COLOUR = 90


def normalise(data: bytes, facts: Facts, store: OriginalStore | JpegStore, background: RGB) -> tuple[bytes, Facts]:
    """The bytes that are stored for a picture, and what they are; ``data`` itself where nothing is encoded again.

    Args:
        data: an encoded picture that passed cleaning.
        facts: what it is.
        store: how pictures are stored.
        background: the colour behind transparent pixels.
    """
    if isinstance(store, OriginalStore):
        return data, facts
    edge = min(facts.width, facts.height)
    wanted = min(edge, store.max_side_px or edge)
    if facts.direct and wanted == edge:
        return data, facts
    picture = decode(data, background)
    if wanted < edge:
        size = (round(picture.width * wanted / edge), round(picture.height * wanted / edge))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    subsampling = "4:4:4" if store.quality >= _FULL_COLOUR else "4:2:0"
    picture.save(buffer, "JPEG", quality=store.quality, subsampling=subsampling, optimize=True)
    return buffer.getvalue(), Facts(picture.width, picture.height, "jpg", direct=True)
