"""OpenAI's stream of server-sent events: previews while an image is denoised, and each image when it is ready."""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

from serving.envelope import ApiError, ErrorEnvelope, from_error
from serving.openai_schemas import (
    CompletedEvent,
    ImagesRequest,
    PartialImageEvent,
    StreamedImage,
    StreamKind,
    TokenDetails,
    Usage,
)
from serving.schemas import Event, GenerationRequest, ImageReady, Preview, Queued
from serving.studio import Studio
from training.errors import DarkroomError

log = logging.getLogger(__name__)


class ImageStream:
    """The events of one request as the lines of a response.

    Args:
        studio: makes the images.
        wanted: what it is asked.
        body: what the client asked.
        kind: how its events are called.
    """

    def __init__(
        self,
        studio: Studio,
        wanted: GenerationRequest,
        body: ImagesRequest,
        kind: StreamKind,
    ) -> None:
        self._studio = studio
        self._events = studio.submit(wanted)
        self._wanted = wanted
        self._body = body
        self._kind = kind
        self._tokens = 0

    @classmethod
    async def begin(
        cls, studio: Studio, wanted: GenerationRequest, body: ImagesRequest, kind: StreamKind
    ) -> ImageStream:
        """Wait until the request is accepted: what is refused is refused with a status, before a stream begins.

        Raises:
            DarkroomError: it is refused.
        """
        stream = cls(studio, wanted, body, kind)
        first = await anext(stream._events)
        if isinstance(first, Queued):
            stream._tokens = first.prompt_tokens
        return stream

    async def aclose(self) -> None:
        """Free its rows, if it did not come to its end."""
        await self._events.aclose()

    async def lines(self) -> AsyncIterator[bytes]:
        """Server-sent events; a failure on the way is an ``error`` event, which OpenAI's clients raise."""
        async with aclosing(self._events) as events:
            try:
                async for event in events:
                    told = await self._told(event)
                    if told is not None:
                        yield _sse(told)
            except DarkroomError as error:
                yield _failed(from_error(error))
            except Exception:
                log.exception("a stream broke")
                yield _failed(ApiError(500, "The server has a defect; its log names it.", code="internal_error"))

    async def _told(self, event: Event) -> PartialImageEvent | CompletedEvent | None:
        format_, quality = self._body.output_format, self._body.output_compression
        if isinstance(event, Preview):
            file = await self._studio.preview(event.image, format_, quality=quality)
            shown = self._shown(file, event.index)
            return PartialImageEvent(
                type=f"{self._kind}.partial_image", partial_image_index=event.number, **dict(shown)
            )
        if isinstance(event, ImageReady):
            made = await self._studio.file(event, self._wanted, format_, quality=quality)
            shown = self._shown(made.file, event.index)
            details = TokenDetails(text_tokens=self._tokens)
            usage = Usage(input_tokens=self._tokens, input_tokens_details=details, total_tokens=self._tokens)
            return CompletedEvent(type=f"{self._kind}.completed", seed=event.seed, usage=usage, **dict(shown))
        return None

    def _shown(self, file: bytes, index: int) -> StreamedImage:
        """The image's file, and what every event says about it."""
        return StreamedImage(
            b64_json=base64.b64encode(file).decode(),
            image_index=index,
            created_at=int(time.time()),
            output_format=self._body.output_format,
            size=self._wanted.size,
        )


def _sse(event: PartialImageEvent | CompletedEvent) -> bytes:
    """Its id first: a stream that goes on from another replica leaves out what its client has."""
    part = event.partial_image_index if isinstance(event, PartialImageEvent) else "image"
    return f"id: {event.image_index}.{part}\nevent: {event.type}\ndata: {event.model_dump_json()}\n\n".encode()


def _failed(error: ApiError) -> bytes:
    body = ErrorEnvelope(error=error.body).model_dump()
    return f"event: error\ndata: {json.dumps(body)}\n\n".encode()
