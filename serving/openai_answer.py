"""The answer to a request in OpenAI's dialect, whole or as a stream; a client that leaves frees its rows."""

from __future__ import annotations

import asyncio
import base64
import time
from contextlib import aclosing

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serving.admission import within_patience
from serving.disconnect import disconnected
from serving.envelope import CLIENT_GONE
from serving.openai_schemas import ImageData, ImagesRequest, ImagesResponse, StreamKind, TokenDetails, Usage
from serving.openai_stream import ImageStream
from serving.schemas import GenerationRequest, ImageReady, Queued
from serving.studio import Studio

_UNBUFFERED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Proxies that gather a response would hold its events back."""


async def answer(
    studio: Studio,
    wanted: GenerationRequest,
    body: ImagesRequest,
    request: Request,
    kind: StreamKind = "image_generation",
) -> ImagesResponse | Response:
    """Make the images as the client wants to be told of them.

    Args:
        studio: makes them.
        wanted: what it is asked.
        body: what the client asked.
        request: tells when the client leaves.
        kind: how a stream's events are called.

    Raises:
        DarkroomError: refused or failed.
    """
    if body.stream:
        stream = await ImageStream.begin(studio, wanted, body, kind)
        return _Streaming(stream)
    making = asyncio.create_task(_make(studio, wanted, body))
    leaving = asyncio.create_task(disconnected(request))
    try:
        await asyncio.wait({making, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return making.result() if making.done() else Response(status_code=CLIENT_GONE)
    finally:
        making.cancel()
        leaving.cancel()


class _Streaming(StreamingResponse):
    """A stream; however it ends, also before its first line was asked for, its rows are freed at once."""

    def __init__(self, stream: ImageStream) -> None:
        super().__init__(stream.lines(), media_type="text/event-stream", headers=_UNBUFFERED)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the lines, until the last one or until the client leaves."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._stream.aclose()


async def _make(studio: Studio, wanted: GenerationRequest, body: ImagesRequest) -> ImagesResponse:
    """Follow the engine's events to the whole answer; files are encoded off the loop."""
    images: dict[int, ImageData] = {}
    tokens = 0
    async with aclosing(studio.submit(within_patience(wanted))) as events:
        async for event in events:
            if isinstance(event, Queued):
                tokens = event.prompt_tokens
            elif isinstance(event, ImageReady):
                made = await studio.file(event, wanted, body.output_format, quality=body.output_compression)
                images[event.index] = ImageData(b64_json=base64.b64encode(made.file).decode(), seed=event.seed)
    return ImagesResponse(
        created=int(time.time()),
        data=[images[index] for index in sorted(images)],
        output_format=body.output_format,
        size=wanted.size,
        usage=Usage(input_tokens=tokens, input_tokens_details=TokenDetails(text_tokens=tokens), total_tokens=tokens),
    )
