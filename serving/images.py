"""Pictures to bytes, with the request that made them inside."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from serving.infotext import KEY, to_infotext
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
        parameters: what a PNG tells about itself, in our words and in the A1111 UI's; empty tells nothing.
        quality: of a lossy file, 0..100; None is lossless for WebP and 95 for JPEG. A PNG has none.
    """
    buffer = io.BytesIO()
    if output_format == "png":
        info = PngInfo()
        if parameters:
            info.add_itxt(PARAMETERS_KEY, json.dumps(parameters))
            info.add_itxt(KEY, to_infotext(parameters))
        image.save(buffer, "PNG", pnginfo=info)
    elif output_format == "webp":
        image.save(buffer, "WEBP", lossless=quality is None, quality=80 if quality is None else quality)
    else:
        image.save(buffer, "JPEG", quality=95 if quality is None else quality)
    return buffer.getvalue()


def parameters_of(request: GenerationRequest, *, seed: int, model: str) -> dict[str, object]:
    """What makes this one image again: the request, with the image's own seed, and the model."""
    fields = request.model_dump(exclude={"images", "previews", "seed", "start"})
    if request.start is not None:
        fields |= {"start_sha256": _digest(request.start.image), "strength": request.start.strength}
        if request.start.mask is not None:
            fields["mask_sha256"] = _digest(request.start.mask)
    return {"model": model, **fields, "seed": seed}


def _digest(image: Image.Image) -> str:
    """Names a picture by its pixels."""
    return hashlib.sha256(image.tobytes()).hexdigest()
