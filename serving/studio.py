"""What every dialect asks for pictures: the engine, with checks around it, marks on what leaves, and an audit log.

Checks, marks and files are made on threads of their own: the loop that denoises never waits for them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Self, TypeVar

import torch
from PIL import Image

from serving.admission import Admission
from serving.admission_config import AdmissionConfig
from serving.audit_config import AuditConfig
from serving.audit_log import AuditLog, Outcome
from serving.caller import current_caller
from serving.engine import Engine
from serving.errors import EngineError
from serving.execution import Execution
from serving.images import OutputFormat, Words, encode_image
from serving.infotext import to_infotext
from serving.model import ModelCard
from serving.observer import Observer, Silent
from serving.parameters import Parameters, parameters_of
from serving.provenance_config import ProvenanceConfig
from serving.provenance_credentials import Signer
from serving.safety import Safety, SafetyError
from serving.schemas import Event, GenerationRequest, ImageReady, Preview
from serving.watermark import embed, too_small
from training.errors import DarkroomError

T = TypeVar("T")


@dataclass(frozen=True)
class Picture:
    """A file that is ready to be sent.

    Attributes:
        file: its bytes.
        parameters: what makes it again, as they stand in the file.
    """

    file: bytes = field(repr=False)
    parameters: Parameters

    @property
    def infotext(self) -> str:
        """The parameters in the A1111 UI's words."""
        return to_infotext(self.parameters.model_dump())


class Studio:
    """The engine and what surrounds it. Use it as ``async with studio:``; that starts and stops the engine, too.

    Args:
        engine: not started yet.
        card: the model that it runs.
        provenance: how pictures are marked.
        safety: what is refused.
        audit: the audit log.
        admission: how much is let in.
        observer: told of requests that are refused here.

    Raises:
        ConfigError: the signing certificate cannot be used.
    """

    def __init__(
        self,
        engine: Engine,
        card: ModelCard,
        *,
        provenance: ProvenanceConfig | None = None,
        safety: Safety | None = None,
        audit: AuditConfig | None = None,
        admission: AdmissionConfig | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.engine = engine
        self.card = card
        self.provenance = provenance or ProvenanceConfig()
        self.safety = safety or Safety()
        self.audit = AuditLog(audit or AuditConfig(), card)
        self._observer = observer or Silent()
        self.admission = Admission(engine, admission, observer=self._observer)
        self._signer = None if self.provenance.credentials is None else Signer(self.provenance.credentials)

    async def __aenter__(self) -> Self:
        self._threads = ThreadPoolExecutor(2, "mark")
        self.audit.__enter__()
        await self.engine.__aenter__()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.engine.__aexit__(*exception)
        await asyncio.to_thread(self._threads.shutdown)
        await asyncio.to_thread(self.audit.__exit__, *exception)

    async def submit(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """The engine's events of a request, checked; closing the generator frees its rows within one step.

        Previews that a check refuses are left out.

        Raises:
            SafetyError: a check refuses the prompt, or a picture.
            QuotaError, WorkLimitError: it is not let in.
            RequestError, QueueFullError, DeadlineError, EngineError: as the engine says.
        """
        caller, started = current_caller(), time.monotonic()
        outcome: Outcome = "cancelled"
        reason: str | None = None
        accepted, unfinished = False, request.images
        try:
            if self.safety.looks_at_prompts:
                await self._aside(self.safety.check_prompt, request.prompt)
            async with aclosing(self.admission.submit(request)) as events:
                async for event in events:
                    accepted = True
                    if isinstance(event, Preview) and not await self._may_be_seen(event.image):
                        continue
                    if isinstance(event, ImageReady):
                        await self._check(event.image)
                        unfinished -= 1
                        outcome = "cancelled" if unfinished else "done"
                    yield event
        except Exception as error:
            if isinstance(error, SafetyError) and not accepted:
                self._observer.rejected("unsafe")
            lost = isinstance(error, EngineError) or not isinstance(error, DarkroomError)
            outcome, reason = "failed" if lost else "refused", type(error).__name__
            raise
        finally:
            seconds = time.monotonic() - started
            self.audit.write(request, caller, outcome, seconds=seconds, reason=reason)

    async def file(
        self, ready: ImageReady, request: GenerationRequest, output_format: OutputFormat, *, quality: int | None = None
    ) -> Picture:
        """The file of a finished picture: marked, with its parameters inside, and signed where the config says so.

        Args:
            ready: the picture.
            request: what made it.
            output_format: what file to make.
            quality: of a lossy file; see ``serving.images.encode_image``.

        Raises:
            ServeError: it cannot be signed.
        """
        return await self._aside(self._made, ready, request, output_format, quality)

    async def preview(self, image: Image.Image, output_format: OutputFormat, *, quality: int | None = None) -> bytes:
        """The file of a preview, which carries nothing."""
        return await self._aside(partial(encode_image, image, output_format, quality=quality))

    def _made(
        self, ready: ImageReady, request: GenerationRequest, output_format: OutputFormat, quality: int | None
    ) -> Picture:
        mark = self.provenance.watermark
        marked = mark.enabled and too_small(request.width, request.height) is None
        parameters = parameters_of(
            request,
            seed=ready.seed,
            card=self.card,
            execution=execution_of(self.engine, request),
            output_format=output_format,
            quality=quality,
            watermark_strength=mark.strength if marked else None,
        )
        return Picture(self._signed(written(ready.image, parameters), parameters), parameters)

    def _signed(self, file: bytes, parameters: Parameters) -> bytes:
        return file if self._signer is None else self._signer.sign(file, parameters.output_format, parameters)

    async def _may_be_seen(self, image: Image.Image) -> bool:
        return not self.safety.looks_at_images or await self._aside(self.safety.allows, image)

    async def _check(self, image: Image.Image) -> None:
        if self.safety.looks_at_images:
            await self._aside(self.safety.check_picture, image)

    async def _aside(self, work: Callable[..., T], *args: object) -> T:
        """What ``work`` returns or raises, on a thread for marks: the event loop goes on meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(work, *args))


def written(image: Image.Image, parameters: Parameters) -> bytes:
    """The file that the parameters describe, before it is signed; equal input gives equal bytes."""
    if parameters.watermark is not None and parameters.watermark_strength is not None:
        image = embed(image, parameters.watermark, parameters.watermark_strength)
    words = Words(parameters.model_dump_json(exclude_none=True), to_infotext(parameters.model_dump()))
    return encode_image(image, parameters.output_format, words, quality=parameters.quality)


def execution_of(engine: Engine, request: GenerationRequest) -> Execution:
    """How a request's pictures are computed, once the first of its size was made."""
    return Execution(
        padded_rows=engine.padded_rows(request),
        precision="bfloat16" if engine.speed.bf16 else "float32",
        compiled=engine.speed.compiled,
        step_cache=engine.speed.step_cache,
        device=engine.device,
        threads=torch.get_num_threads(),
    )
