"""OpenAI's edits and variations: multipart forms with pictures in them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Request
from PIL import Image, ImageOps
from pydantic import Field, ValidationError
from starlette.datastructures import FormData, UploadFile

from serving.config import LimitConfig
from serving.envelope import ApiError, from_validation
from serving.model import ModelCard
from serving.openai_answer import answer
from serving.openai_api import ERRORS
from serving.openai_request import out_of_range, require_model, sides, to_request
from serving.openai_schemas import ImagesRequest, ImagesResponse
from serving.schemas import StartImage
from serving.studio import Studio
from serving.uploads import MAX_UPLOAD_BYTES, beside_loop, read_picture, start_image, two_levels

Strength = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
"""How much of the way from noise is taken; 1 forgets the picture."""
_MAX_FILES = 17
"""Sixteen pictures and a mask: as many as OpenAI's clients may send, so that more than one is refused in our words."""
_MAX_FIELDS = 100

Body = TypeVar("Body", bound=ImagesRequest)


class EditsRequest(ImagesRequest):
    """The fields of ``POST /v1/images/edits`` that are no files."""

    strength: Strength | None = None
    """How far the picture may change: 0.75 for a whole picture, 1 where a mask says what may change."""
    input_fidelity: Literal["high", "low"] | None = None
    """OpenAI's word for the same: ``high`` is a strength of 0.5."""


class VariationsRequest(ImagesRequest):
    """The fields of ``POST /v1/images/variations`` that are no files."""

    prompt: str = ""
    """OpenAI has none here; one that is given is followed."""
    strength: Strength = 0.6
    """How far the picture may change."""


def edits_router(studio: Studio, card: ModelCard, limits: LimitConfig) -> APIRouter:
    """The routes of pictures made from pictures."""
    router = APIRouter(prefix="/v1", tags=["openai"], responses=ERRORS)

    @router.post("/images/edits", response_model=ImagesResponse, openapi_extra=_form(EditsRequest, "mask"))
    async def edit(request: Request) -> Any:
        """Change a picture, or the transparent part of its mask, as a prompt says."""
        async with _read(request) as form:
            body = _fields(form, EditsRequest, files=("image", "image[]", "mask"))
            require_model(body.model, card)
            image = await _file(form, ("image", "image[]"))
            mask = await _file(form, ("mask",)) if "mask" in form else None
        start = await beside_loop(_start, image, mask, body, sides(body.size, card.sizes))
        return await answer(studio, to_request(body, card, limits, start), body, request, "image_edit")

    @router.post("/images/variations", response_model=ImagesResponse, openapi_extra=_form(VariationsRequest))
    async def vary(request: Request) -> Any:
        """Make pictures like a given one."""
        async with _read(request) as form:
            body = _fields(form, VariationsRequest, files=("image",))
            require_model(body.model, card)
            image = await _file(form, ("image",))
        picture = await beside_loop(read_picture, image, param="image", size=sides(body.size, card.sizes))
        start = start_image(picture, None, body.strength)
        return await answer(studio, to_request(body, card, limits, start), body, request)

    return router


@asynccontextmanager
async def _read(request: Request) -> AsyncIterator[FormData]:
    """The form; its files are gone afterwards.

    Raises:
        ApiError: its text is in no charset that can be read.
        HTTPException: it is no form, or has too many parts.
    """
    try:
        form = await request.form(max_files=_MAX_FILES, max_fields=_MAX_FIELDS)
    except ValueError as error:  # of Python's codecs: the charset is the client's own word
        message = "The form's text cannot be decoded.\n  rule:    UTF-8"
        raise ApiError(400, message, code="invalid_body") from error
    try:
        yield form
    finally:
        await form.close()


def _start(image: bytes, mask: bytes | None, body: EditsRequest, size: tuple[int, int]) -> StartImage:
    """The picture, and what of it may change: the transparent part of the mask, else of the picture itself."""
    picture = read_picture(image, param="image", size=size)
    alpha = picture[1] if mask is None else read_picture(mask, param="mask", size=size)[1]
    free = None if alpha is None else two_levels(ImageOps.invert(alpha))
    if free is not None and free.getbbox() is None:
        free = None
    if free is None and mask is not None:
        raise out_of_range("mask", "an opaque picture", "a PNG whose transparent part may change")
    return start_image(picture, free, _strength(body, free))


def _strength(body: EditsRequest, mask: Image.Image | None) -> float:
    if body.strength is not None:
        return body.strength
    if body.input_fidelity == "high":
        return 0.5
    return 0.75 if mask is None else 1.0


def _fields(form: FormData, kind: type[Body], *, files: tuple[str, ...]) -> Body:
    """The form's fields, checked as a generation's body is.

    Raises:
        ApiError: the first one that is wrong.
    """
    texts = {name: value for name, value in form.multi_items() if name not in files}
    try:
        return kind.model_validate(texts)
    except ValidationError as error:
        raise from_validation(error.errors(), (*kind.model_fields, *files)) from error


async def _file(form: FormData, names: tuple[str, ...]) -> bytes:
    """The one file that is sent under any of these names.

    Raises:
        ApiError: there is none, or there are several: this model reads one picture.
    """
    sent = [value for name in names for value in form.getlist(name)]
    if not sent:
        message = f"Missing required parameter: '{names[0]}'."
        raise ApiError(400, message, param=names[0], code="missing_required_parameter")
    if len(sent) > 1:
        raise out_of_range(names[0], f"{len(sent)} pictures", "one: this model reads no more")
    if not isinstance(sent[0], UploadFile):
        raise out_of_range(names[0], "text", "a file")
    return await sent[0].read(MAX_UPLOAD_BYTES + 1)


def _form(kind: type[ImagesRequest], *more_files: str) -> dict[str, Any]:
    """What OpenAPI says of a form that is read by hand."""
    schema = kind.model_json_schema()
    files = {name: {"type": "string", "format": "binary"} for name in ("image", *more_files)}
    schema["properties"] |= files
    schema["required"] = [*schema.get("required", ()), "image"]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
