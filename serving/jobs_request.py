"""From the body of a job to its record: the limits of all dialects, and the pictures that it starts from."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

from serving.admission import on_terms
from serving.caller import current_caller
from serving.config import LimitConfig
from serving.idempotency import name_of
from serving.jobs_record import JobRecord, new_id
from serving.jobs_schemas import JobRequest
from serving.model import ModelCard
from serving.openai_request import out_of_range, sides, to_request
from serving.openai_schemas import ImagesRequest
from serving.schemas import GenerationRequest, StartImage
from serving.uploads import beside_loop, from_base64, read_picture, start_image

_SHARED = set(JobRequest.model_fields) & set(ImagesRequest.model_fields)
"""Fields that mean the same in OpenAI's dialect."""


@dataclass(frozen=True)
class NewJob:
    """A job that is not accepted yet.

    Attributes:
        record: as it will be kept.
        asked: its request, with the picture that it starts from.
        body_sha256: of what the client sent, whatever its order and spaces.
    """

    record: JobRecord
    asked: GenerationRequest
    body_sha256: str


async def new_job(body: JobRequest, idempotency_key: str | None, card: ModelCard, limits: LimitConfig) -> NewJob:
    """What a client asks for.

    Args:
        body: as it came.
        idempotency_key: as it came.
        card: the model.
        limits: what one request may ask for.

    Raises:
        ApiError: a value is out of range.
        RequestError: a picture or the size is refused.
    """
    caller = current_caller()
    name = None if idempotency_key is None else name_of(idempotency_key, caller.key)
    start = await beside_loop(_start, body, sides(body.size, card.sizes))
    shared = ImagesRequest.model_validate(body.model_dump(include=_SHARED))
    asked = on_terms(to_request(shared, card, limits, start), caller.terms)
    record = JobRecord(
        id=new_id(),
        key=caller.key,
        created_s=time.time(),
        model=card.names[-1],
        bundle_sha256=card.bundle_sha256,
        request=asked.model_copy(update={"start": None}),
        strength=None if start is None else start.strength,
        masked=start is not None and start.mask is not None,
        output_format=body.output_format,
        quality=body.output_compression,
        webhook_url=body.webhook_url,
        idempotency=name,
    )
    return NewJob(record, asked, await beside_loop(_sha256, body))


def _start(body: JobRequest, size: tuple[int, int]) -> StartImage | None:
    if body.image is None:
        for param in ("mask", "strength"):
            if getattr(body, param) is not None:
                raise out_of_range(param, "given without image", "image and mask, or neither")
        return None
    picture = read_picture(from_base64(body.image, param="image"), param="image", size=size)
    mask = None
    if body.mask is not None:
        mask = read_picture(from_base64(body.mask, param="mask"), param="mask", size=size)[0].convert("L")
    usual = 0.75 if mask is None else 1.0
    return start_image(picture, mask, usual if body.strength is None else body.strength)


def _sha256(body: JobRequest) -> str:
    return hashlib.sha256(body.model_dump_json(exclude_unset=True).encode(errors="surrogatepass")).hexdigest()
