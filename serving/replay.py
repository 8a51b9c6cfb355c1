"""A picture made again from its own parameters, and compared with what it was."""

from __future__ import annotations

import asyncio
import io
import math
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from PIL import Image, ImageOps
from pydantic import ValidationError

from serving.client import Picture, request_images
from serving.errors import RequestError, ServeError
from serving.execution import Execution
from serving.images import Words, read_words
from serving.parameters import Parameters, pixels_sha256
from serving.readiness import Readiness
from serving.rollout import LOOPBACK
from serving.schemas import StartImage
from serving.uploads import checked_header, read_picture, read_whole, two_levels
from training.errors import UsageError

_MARKED = ("software", "watermark", "watermark_strength")
"""What may differ between two pictures of the same request, beside how they were computed."""


@dataclass(frozen=True)
class Comparison:
    """Two pictures of one size.

    Attributes:
        bit_equal: every pixel is the same.
        differing_pixels: those that are not.
        pixels: all of them.
        max_difference: the largest, in levels of 255.
        psnr_db: peak signal to noise ratio; None where they are equal.
        causes: what was not the same when they were made, as far as both tell.
    """

    bit_equal: bool
    differing_pixels: int
    pixels: int
    max_difference: int
    psnr_db: float | None
    causes: tuple[str, ...] = ()


def read_parameters(file: bytes) -> Parameters:
    """What makes a picture again.

    Args:
        file: the picture; a PNG, WebP or JPEG that Darkroom made.

    Raises:
        UsageError: it is no picture, or it does not say how it was made.
    """
    words = read_words(_checked(file))
    if not words.json:
        raise _tells_nothing(words)
    try:
        return Parameters.model_validate_json(words.json)
    except ValidationError as error:
        first = error.errors()[0]
        rule = f"{'.'.join(str(part) for part in first['loc']) or 'the whole'}: {first['msg']}"
        raise UsageError("The picture's parameters are not complete.", rule=rule) from error


def read_start(parameters: Parameters, image: bytes | None, mask: bytes | None) -> StartImage | None:
    """What an edit started from, out of the files that were sent then.

    Args:
        parameters: the edit's.
        image: the picture that it changed; None where there is none.
        mask: a picture that is transparent where it may change, or black and white with white there; None takes the
            transparency of ``image``.

    Returns:
        None for a picture that was made from noise.

    Raises:
        UsageError: the picture or the mask is missing, is not needed, or is another one.
    """
    if parameters.start_sha256 is None or parameters.strength is None:
        if image is not None or mask is not None:
            raise UsageError("This picture was made from noise.", rule="--image and --mask are for edits")
        return None
    if image is None:
        raise UsageError(
            "This picture was made from another one, which is not in it.",
            value=f"sha256 of its pixels: {parameters.start_sha256}",
            rule="an edit needs the picture that it changed",
            mend="--image PICTURE" + ("" if parameters.mask_sha256 is None else " and --mask MASK"),
        )
    size = parameters.width, parameters.height
    picture, alpha = read_picture(image, param="image", size=size)
    _require_same("picture", "--image", parameters.start_sha256, [picture])
    if parameters.mask_sha256 is None:
        return StartImage(picture, parameters.strength)
    masks = [] if alpha is None else [two_levels(ImageOps.invert(alpha))]
    if mask is not None:
        seen, hole = read_picture(mask, param="mask", size=size)
        painted = seen.convert("L")
        masks = [] if hole is None else [two_levels(ImageOps.invert(hole))]
        masks += [two_levels(painted), two_levels(ImageOps.invert(painted))]
    return StartImage(picture, parameters.strength, _require_same("mask", "--mask", parameters.mask_sha256, masks))


def replay_there(url: str, parameters: Parameters, start: StartImage | None, *, timeout_s: float) -> bytes:
    """The file that an endpoint makes of the parameters.

    Raises:
        UsageError: the endpoint runs another model, or refuses.
        ServeError: nobody answers there, or it failed.
    """
    _require_model(parameters, _running(url))
    body: dict[str, object] = {
        **parameters.model_dump(include={"prompt", "negative_prompt", "seed", "guidance_scale", "sampler", "adapter"}),
        "num_inference_steps": parameters.steps,
        "size": f"{parameters.width}x{parameters.height}",
        "output_format": parameters.output_format,
        "output_compression": parameters.quality,
        "strength": parameters.strength,
    }
    files = {} if start is None else {"image": _png(start.image)}
    if start is not None and start.mask is not None:
        hole = Image.new("RGB", start.image.size)
        hole.putalpha(ImageOps.invert(start.mask))
        files["mask"] = _png(hole)
    made: list[Picture] = request_images(url, body, files=files, timeout_s=timeout_s)
    return made[0].file


def replay_here(bundle: Path, parameters: Parameters, start: StartImage | None) -> bytes:
    """The file that a bundle on this machine makes of the parameters, run as they say.

    Raises:
        UsageError: the bundle is another model, or the request does not fit it.
        DarkroomError: it does not load, or fails.
    """
    from serving.replay_engine import made_by

    return asyncio.run(made_by(bundle, parameters, start))


def compare(before: bytes, after: bytes) -> Comparison:
    """How two pictures differ, and what they say of why.

    Raises:
        UsageError: one of them is no picture.
        ServeError: they are not of one size.
    """
    old, new = (np.asarray(_pixels(file)).astype(int) for file in (before, after))
    if old.shape != new.shape:
        sizes = [f"{shape[1]}x{shape[0]}" for shape in (old.shape, new.shape)]
        raise ServeError("The new picture has another size.", value=sizes[1], rule=f"{sizes[0]}, as it says itself")
    difference = np.abs(old - new)
    error = float(np.mean(difference**2))
    return Comparison(
        bit_equal=not difference.any(),
        differing_pixels=int(difference.any(axis=-1).sum()),
        pixels=old.shape[0] * old.shape[1],
        max_difference=int(difference.max()),
        psnr_db=None if error == 0 else 10 * math.log10(255**2 / error),
        causes=tuple(_causes(read_parameters(before), read_parameters(after))),
    )


def _causes(before: Parameters, after: Parameters) -> list[str]:
    pairs = [(name, getattr(before, name), getattr(after, name)) for name in _MARKED]
    then, now = before.execution, after.execution
    pairs += [(name, getattr(then, name), getattr(now, name)) for name in Execution.model_fields]
    return [f"{name.replace('_', ' ')}: {old} then, {new} now" for name, old, new in pairs if old != new]


def _require_model(parameters: Parameters, sha256: str) -> None:
    if sha256 != parameters.bundle_sha256:
        raise another_model(parameters, f"bundle_sha256 {sha256}")


def another_model(parameters: Parameters, found: str) -> UsageError:
    """The refusal to make a picture with weights that did not make it."""
    return UsageError(
        "The picture was made by another model.",
        value=found,
        rule=f"{parameters.model}, bundle_sha256 {parameters.bundle_sha256}",
        mend="--url of an endpoint that serves it, or --bundle with its directory",
    )


def _running(url: str) -> str:
    """The weights that an endpoint runs.

    Raises:
        ServeError: nobody answers there, or not in our words.
    """
    place = f"{url.rstrip('/')}/readyz"
    try:
        answer = httpx.get(place, timeout=10, trust_env=httpx.URL(place).host not in LOOPBACK)
        return Readiness.model_validate_json(answer.content).bundle_sha256
    except (httpx.RequestError, httpx.InvalidURL, ValidationError) as error:
        reason = type(error).__name__ if isinstance(error, ValidationError) else str(error) or type(error).__name__
        raise ServeError(
            "No endpoint of Darkroom answers there.",
            value=url,
            rule=reason,
            mend="darkroom serve MODEL, --url of an endpoint that runs, or --bundle with the model's directory",
        ) from error


def _require_same(what: str, option: str, sha256: str, choices: list[Image.Image]) -> Image.Image:
    """The one of several readings of a file that the edit was made with."""
    for image in choices:
        if pixels_sha256(image) == sha256:
            return image
    raise UsageError(
        f"The edit was made with another {what}.",
        value=f"sha256 of its pixels: {pixels_sha256(choices[0]) if choices else 'none: it has no transparent part'}",
        rule=sha256,
        mend=f"{option} with the file that was sent then",
    )


def _tells_nothing(words: Words) -> UsageError:
    rule = "a file as Darkroom made it: other programs drop its words when they save it"
    if words.infotext:
        rule = "Darkroom's own parameters; it has another program's"
    return UsageError("The picture does not say how it was made.", rule=rule)


def _checked(file: bytes) -> Image.Image:
    try:
        return checked_header(file, param="picture")
    except RequestError as error:
        raise UsageError("This is no picture that can be read.", value=error.value, rule=error.rule) from error


def _pixels(file: bytes) -> Image.Image:
    try:
        return read_whole(file, param="picture")
    except RequestError as error:
        raise UsageError("This is no picture that can be read.", value=error.value, rule=error.rule) from error


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
