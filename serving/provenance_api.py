"""``POST /v1/provenance/verify``: where a picture says that it comes from, and what of that can be believed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, UploadFile
from pydantic import BaseModel, Field, ValidationError

from serving.envelope import ErrorEnvelope
from serving.images import read_words
from serving.infotext import from_infotext
from serving.model import ModelCard
from serving.parameters import Parameters, payload_of
from serving.provenance_config import ProvenanceConfig
from serving.provenance_credentials import State, read_anchors, read_credentials
from serving.uploads import MAX_UPLOAD_BYTES, beside_loop, checked_header, read_whole
from serving.watermark import find, too_small

VERIFY = "/v1/provenance/verify"
"""Its path."""
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorEnvelope} for status in (400, 413, 429, 500)}


class ToldParameters(BaseModel):
    """What the file says in plain words, which anybody can write."""

    found: bool
    """Whether the file has Darkroom's parameters, complete."""
    parameters: Parameters | None
    """Those; what makes the picture again."""
    infotext: dict[str, str]
    """The A1111 UI's settings by name; empty where it has none."""
    this_model: bool
    """Whether they name the weights that this server runs."""


class ToldCredentials(BaseModel):
    """What the C2PA manifest says."""

    state: State
    """``trusted``: signed by whom the operator trusts, and unchanged since; ``valid``: by somebody, and unchanged;
    ``invalid``: changed since, or not signed as it should be; ``absent``."""
    signer: str | None
    """The certificate's organisation and name."""
    issued: str | None
    """When, as a time-stamping authority says."""
    generator: str | None
    """The software that says it made the picture."""
    picture: dict[str, Any]
    """Darkroom's own assertion: model, run, data, seed; empty where there is none."""
    problems: list[str]
    """What is wrong, as C2PA codes."""


class ToldWatermark(BaseModel):
    """What the pixels say."""

    state: Literal["found", "not_found", "too_small"]
    """``too_small``: pictures of its size are never marked."""
    payload: str | None
    """Six digits: the first ones of the model's ``bundle_sha256``."""
    this_model: bool
    """Whether that is the model that this server runs."""
    confidence: float = Field(ge=0, le=1)
    """1 less the share of unmarked pictures, at most, that look as marked as this one."""
    score: float
    """How far the pixels stand out from an unmarked picture's, in standard deviations."""
    scale: float
    """By how much the picture was enlarged since it was marked."""


class Verification(BaseModel):
    """The answer."""

    width: int
    """Pixels."""
    height: int
    """Pixels."""
    file_format: str
    """By its bytes."""
    parameters: ToldParameters
    """The words in the file."""
    credentials: ToldCredentials
    """The signed manifest."""
    watermark: ToldWatermark
    """The mark in the pixels."""


def verify_router(card: ModelCard, config: ProvenanceConfig) -> APIRouter:
    """The route.

    Args:
        card: the model that this server runs.
        config: whom to trust.

    Raises:
        ConfigError: the trust anchors cannot be read.
    """
    router = APIRouter(tags=["provenance"], responses=ERRORS)
    anchors = read_anchors(config)

    @router.post(VERIFY)
    async def verify(image: Annotated[UploadFile, File(description="The picture.")]) -> Verification:
        """Say where a picture comes from: by its words, its signed manifest and its pixels."""
        data = await image.read(MAX_UPLOAD_BYTES + 1)
        return await beside_loop(_verify, data, card, anchors)

    return router


def _verify(data: bytes, card: ModelCard, anchors: str | None) -> Verification:
    """All three.

    Raises:
        RequestError: it is no picture, or too large, or damaged.
    """
    header = checked_header(data, param="image")
    words = read_words(header)
    parameters = _parameters(words.json)
    width, height = header.size
    return Verification(
        width=width,
        height=height,
        file_format=str(header.format),
        parameters=ToldParameters(
            found=parameters is not None,
            parameters=parameters,
            infotext=from_infotext(words.infotext) if words.infotext else {},
            this_model=parameters is not None and parameters.bundle_sha256 == card.bundle_sha256,
        ),
        credentials=_credentials(data, str(header.format), anchors),
        watermark=_watermark(data, (width, height), card),
    )


def _parameters(text: str) -> Parameters | None:
    try:
        return Parameters.model_validate_json(text) if text else None
    except ValidationError:
        return None


def _credentials(data: bytes, kind: str, anchors: str | None) -> ToldCredentials:
    said = read_credentials(data, kind, anchors)
    return ToldCredentials(
        state=said.state,
        signer=said.signer,
        issued=said.issued,
        generator=said.generator,
        picture=said.picture,
        problems=list(said.problems),
    )


def _watermark(data: bytes, size: tuple[int, int], card: ModelCard) -> ToldWatermark:
    """The mark, looked for in a picture of any size: a crop of a marked one may be smaller than what is marked."""
    found = find(read_whole(data, param="image"))
    state: Literal["found", "not_found", "too_small"] = "found"
    if found.payload is None:
        state = "not_found" if too_small(*size) is None else "too_small"
    return ToldWatermark(
        state=state,
        payload=found.payload,
        this_model=found.payload == payload_of(card.bundle_sha256),
        confidence=1 - found.false_positive,
        score=round(found.score, 2),
        scale=round(found.scale, 3),
    )
