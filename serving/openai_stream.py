"""OpenAI's stream of server-sent events: previews while an image is denoised, and each image when it is ready."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from PIL import Image
from pydantic import BaseModel

from serving.envelope import ApiError, ErrorEnvelope, from_error
from serving.images import encode_image, parameters_of
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
from training.errors import DarkroomError

log = logging.getLogger(__name__)


class ImageStream:
    """The events of one request as the lines of a response.

    Args:
        events: the engine's, already past admission: what is refused is refused with a status, before a stream begins.
        wanted: what the engine was asked.
        body: what the client asked.
        model: the model's name, for the parameters inside the files.
        kind: how its events are called.
    """

    def __init__(
        self,
        events: AsyncGenerator[Event, None],
        wanted: GenerationRequest,
        body: ImagesRequest,
        model: str,
        kind: StreamKind,
    ) -> None:
        self._events = events
        self._wanted = wanted
        self._body = body
        self._model = model
        self._kind = kind
        self._tokens = 0

    @classmethod
    async def begin(
        cls,
        events: AsyncGenerator[Event, None],
        wanted: GenerationRequest,
        body: ImagesRequest,
        model: str,
        kind: StreamKind,
    ) -> ImageStream:
        """Wait until the engine has accepted the request.

        Raises:
            DarkroomError: it refused.
        """
        stream = cls(events, wanted, body, model, kind)
        first = await anext(events)
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
                        yield _sse(told.type, told)
            except DarkroomError as error:
                yield _failed(from_error(error))
            except Exception:
                log.exception("a stream broke")
                yield _failed(ApiError(500, "The server has a defect; its log names it.", code="internal_error"))

    async def _told(self, event: Event) -> PartialImageEvent | CompletedEvent | None:
        if isinstance(event, Preview):
            shown = await self._shown(event.image, event.index, {})
            return PartialImageEvent(
                type=f"{self._kind}.partial_image", partial_image_index=event.number, **dict(shown)
            )
        if isinstance(event, ImageReady):
            parameters = parameters_of(self._wanted, seed=event.seed, model=self._model)
            shown = await self._shown(event.image, event.index, parameters)
            details = TokenDetails(text_tokens=self._tokens)
            usage = Usage(input_tokens=self._tokens, input_tokens_details=details, total_tokens=self._tokens)
            return CompletedEvent(type=f"{self._kind}.completed", seed=event.seed, usage=usage, **dict(shown))
        return None

    async def _shown(self, image: Image.Image, index: int, parameters: dict[str, object]) -> StreamedImage:
        """The image's file, encoded off the loop, and what every event says about it."""
        body = self._body
        file = await asyncio.to_thread(
            encode_image, image, body.output_format, parameters, quality=body.output_compression
        )
        return StreamedImage(
            b64_json=base64.b64encode(file).decode(),
            image_index=index,
            created_at=int(time.time()),
            output_format=body.output_format,
            size=f"{self._wanted.size}x{self._wanted.size}",
        )


def _sse(name: str, data: BaseModel) -> bytes:
    return f"event: {name}\ndata: {data.model_dump_json()}\n\n".encode()


def _failed(error: ApiError) -> bytes:
    body = ErrorEnvelope(error=error.body).model_dump()
    return f"event: error\ndata: {json.dumps(body)}\n\n".encode()
