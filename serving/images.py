"""Pictures to bytes, with the request that made them inside."""

from __future__ import annotations

import io
import json
from typing import Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from serving.schemas import GenerationRequest

OutputFormat = Literal["png", "webp", "jpeg"]
"""What a picture can be sent as."""
PARAMETERS_KEY = "darkroom"
"""The PNG text chunk that holds the parameters, as JSON."""


def encode_image(
    image: Image.Image, output_format: OutputFormat, parameters: dict[str, object], *, quality: int | None = None
) -> bytes:
    """The file's bytes.

    Args:
        image: RGB picture.
        output_format: what file to make.
        parameters: what a PNG tells about itself.
        quality: of a lossy file, 0..100; None is lossless for WebP and 95 for JPEG. A PNG has none.
    """
    buffer = io.BytesIO()
    if output_format == "png":
        info = PngInfo()
        info.add_itxt(PARAMETERS_KEY, json.dumps(parameters))
        image.save(buffer, "PNG", pnginfo=info)
    elif output_format == "webp":
        image.save(buffer, "WEBP", lossless=quality is None, quality=80 if quality is None else quality)
    else:
        image.save(buffer, "JPEG", quality=95 if quality is None else quality)
    return buffer.getvalue()


def parameters_of(request: GenerationRequest, *, seed: int, model: str) -> dict[str, object]:
    """What makes this one image again: the request, with the image's own seed, and the model."""
    return {"model": model, **request.model_dump(exclude={"images", "seed"}), "seed": seed}
