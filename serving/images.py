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


def encode_image(image: Image.Image, output_format: OutputFormat, parameters: dict[str, object]) -> bytes:
    """The file's bytes; a PNG carries ``parameters``, WebP is lossless, JPEG is quality 95."""
    buffer = io.BytesIO()
    if output_format == "png":
        info = PngInfo()
        info.add_itxt(PARAMETERS_KEY, json.dumps(parameters))
        image.save(buffer, "PNG", pnginfo=info)
    elif output_format == "webp":
        image.save(buffer, "WEBP", lossless=True)
    else:
        image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def parameters_of(request: GenerationRequest, *, seed: int, model: str) -> dict[str, object]:
    """What makes this one image again: the request, with the image's own seed, and the model."""
    return {"model": model, **request.model_dump(exclude={"images", "seed"}), "seed": seed}
