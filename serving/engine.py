"""The engine: continuous, step-level batching over the denoiser contract.

The life of a request: ``submit`` reserves places in the queue, the text thread encodes the prompt and draws the
noise, the images wait; at every step the scheduler chooses whose turn it is, the torch thread advances them by one
evaluation, and what is finished goes to the thread that draws it; the pictures come back as events.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Self

import torch

from serving.adapters import Adapters
from serving.batching import denoise
from serving.bucket import Bucket
from serving.config import BatchConfig
from serving.drawing import Drawing
from serving.errors import DeadlineError, EngineError, QueueFullError, RequestError
from serving.job import Job
from serving.line import Line
from serving.lost import lost, not_running
from serving.observer import Observer, Outcome, RejectReason, Silent
from serving.preparing import Preparing, evaluations, rows_of
from serving.prompt_cache import Encoder, PromptCache
from serving.scheduling import Scheduler
from serving.schemas import Event, GenerationRequest, ImageReady, Preview, Queued
from serving.sizes import Sizes
from serving.speed import SpeedConfig
from serving.warming import warm
from serving.width_store import WidthStore
from serving.widths import Size, Widths
from training.canvas import Canvas
from training.objectives import Denoiser
from training.samplers import times

MAX_RETRY_AFTER_S = 120
"""Clients give up above this."""
MAX_FAILURES = 3
"""Steps that fail one after the other until the engine counts as broken: a lost device does not come back."""
_REASONS: dict[type[Exception], RejectReason] = {
    RequestError: "invalid",
    QueueFullError: "queue_full",
    DeadlineError: "deadline",
    EngineError: "stopping",
}

log = logging.getLogger(__name__)


class Engine:
    """The only owner of a replica's accelerator.

    Use it as ``async with engine:``; requests are accepted inside.

    Args:
        denoiser: the model.
        encoder: prompts to conditioning.
        canvas: where the model draws; its autoencoder, if there is one, is where the denoiser's weights are.
        config: how the network is filled.
        grid: the times of so many steps, as the model's objective gives them.
        sizes: which pictures the model can make; None is the canvas's alone.
        speed: what may be left out.
        adapters: LoRAs that requests may name.
        widths: where measured widths are kept; None measures them anew.
        observer: told of everything that happens to requests.
        device: where the denoiser's weights are.
        clock: seconds, for deadlines and measurements.

    Attributes:
        steps_taken: calls of the network's, since the start.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        encoder: Encoder,
        *,
        canvas: Canvas,
        config: BatchConfig,
        grid: Callable[[int], torch.Tensor] = times,
        sizes: Sizes | None = None,
        speed: SpeedConfig | None = None,
        adapters: Adapters | None = None,
        widths: WidthStore | None = None,
        observer: Observer | None = None,
        device: str = "cpu",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.denoiser = denoiser
        self.config = config
        self.sizes = sizes or Sizes.only(canvas.resolution)
        self.adapters = adapters or Adapters()
        self.observer: Observer = observer or Silent()
        self.steps_taken = 0
        self.device = device
        self.speed = speed = speed or SpeedConfig()
        prompts = PromptCache(speed.prompt_cache_bytes)
        self._preparing = Preparing(denoiser, encoder, prompts, canvas, grid, speed, device)
        self._widths = Widths(config, widths)
        self._line = Line(Scheduler(config.scheduling, self._widths.call_of))
        self._drawing = Drawing()
        self._clock = clock
        self._failures = 0
        self._work = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._torch_thread = ThreadPoolExecutor(1, "denoise")
        self._text_thread = ThreadPoolExecutor(1, "encode")
        width, height = self.sizes.default
        await self._settle(Size(height, width))
        self._loop = asyncio.create_task(self._serve(), name="engine")
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.wait([self._loop])
        # they wait for what runs, and the callers of a prompt that is being encoded need this loop meanwhile
        for close in (self._torch_thread.shutdown, self._text_thread.shutdown, self._drawing.close):
            await asyncio.to_thread(close)

    @property
    def ready(self) -> bool:
        """Whether requests are accepted and denoised; not once ``MAX_FAILURES`` steps have failed in a row."""
        return self._loop is not None and not self._loop.done() and self._failures < MAX_FAILURES

    @property
    def running_images(self) -> int:
        """Images in the call that is being made, or being drawn."""
        return len(self._line.running) + self._drawing.finishing

    @property
    def waiting_images(self) -> int:
        """Images that were accepted and wait for their turn."""
        return self._line.waiting

    @property
    def backlog_s(self) -> float:
        """Seconds of the device that the images need which are here."""
        return self._line.backlog_s

    def promised_s(self, deadline_s: float) -> float:
        """Seconds of the device that those need who are here and whose deadlines come within so many seconds."""
        return self._line.promised_s(self._clock() + deadline_s)

    def retry_after_s(self) -> int:
        """Seconds until the work that is here now is done, from the measured cost of calls; 1 to 120."""
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(self.backlog_s)))

    def padded_rows(self, request: GenerationRequest) -> int:
        """Rows of the calls that make a request's pictures, once the first of its size was made."""
        return self._widths.call_of(Bucket(request.height, request.width)).rows

    def predicted_s(self, request: GenerationRequest) -> float:
        """Seconds that a request takes at least, were it alone; of a size that was never made, 0."""
        if not self._widths.settled(Size(request.height, request.width)):
            return 0.0
        call = self._widths.call_of(Bucket(request.height, request.width))
        return math.ceil(rows_of(request) / call.rows) * evaluations(request) * call.seconds

    async def submit(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Make the request's images; closing the generator frees their rows within one step.

        Raises:
            RequestError: the prompt is too long, the model cannot make that size, or there is no such adapter.
            QueueFullError: too many images wait already.
            DeadlineError: it cannot be made in time any more.
            EngineError: denoising failed or the engine is stopping.
        """
        arrived_s = self._clock()
        try:
            jobs, prompt_tokens = await self._accept(request, arrived_s)
        except (RequestError, QueueFullError, DeadlineError, EngineError) as error:
            self.observer.rejected(next(why for kind, why in _REASONS.items() if isinstance(error, kind)))
            raise
        self.observer.accepted(request)
        queued = Queued(self.waiting_images, prompt_tokens)
        self._line.join(jobs)
        self._work.set()
        outcome: Outcome = "cancelled"
        try:
            yield queued
            unfinished = len(jobs)
            while unfinished:
                event = await jobs[0].outbox.get()
                if isinstance(event, EngineError | DeadlineError):
                    outcome = "expired" if isinstance(event, DeadlineError) else "failed"
                    raise event
                unfinished -= isinstance(event, ImageReady)
                outcome = "cancelled" if unfinished else "done"
                if isinstance(event, Preview):
                    self.observer.previewed(request, self._clock() - arrived_s)
                yield event
        finally:
            # at once and not when their turn comes: places, waits and counts are of those who still want a picture
            self._line.leave(jobs)
            self._work.set()
            self.observer.finished(request, self._clock() - arrived_s, outcome)

    async def _accept(self, request: GenerationRequest, arrived_s: float) -> tuple[list[Job], int]:
        """What waits for its turn from now on."""
        self._check(request)
        size = Size(request.height, request.width)
        self._line.encoding += request.images
        try:
            await self._settle(size)
            self._require_in_time(request)
            prepare = partial(self._preparing.jobs, request, arrived_s, self.padded_rows(request))
            prepared = await asyncio.get_running_loop().run_in_executor(self._text_thread, prepare)
        finally:
            self._line.encoding -= request.images
        if not self.ready:  # it stopped meanwhile, and nobody would serve the queue
            raise not_running()
        return prepared

    def _check(self, request: GenerationRequest) -> None:
        if not self.ready:
            raise not_running()
        self.sizes.check(request.width, request.height)
        self.adapters.check(request.adapter)
        self._require_in_time(request)
        if self.waiting_images + request.images > self.config.max_waiting_images:
            raise QueueFullError(self.waiting_images, self.config.max_waiting_images, self.retry_after_s())

    def _require_in_time(self, request: GenerationRequest) -> None:
        if request.deadline_s is not None and (needed := self.predicted_s(request)) > request.deadline_s:
            raise DeadlineError(request.deadline_s, needed)

    async def _settle(self, size: Size) -> None:
        """Fix the width of a size's calls, between two steps, before the first image of it waits."""
        if self._widths.settled(size):
            return
        call = warm(self.denoiser, self._preparing, size)
        try:
            await asyncio.get_running_loop().run_in_executor(self._torch_thread, self._widths.settle, size, call)
        except RuntimeError as error:  # torch's
            raise lost("Pictures of this size cannot be made now.", error) from error

    async def _serve(self) -> None:
        try:
            while True:
                await self._work.wait()
                await self._step()
                if not self._line.jobs:
                    self._work.clear()
        except Exception:
            log.exception("the engine has died")
            raise
        finally:
            self._line.stop(EngineError("The server is stopping.", mend="send the request again"))

    async def _step(self) -> None:
        """One iteration: schedule, denoise, retire."""
        jobs = self._line.turn(self._clock())
        self.observer.waiting(self.waiting_images, self.running_images)
        if not jobs:
            return
        started = self._clock()
        denoising = asyncio.get_running_loop().run_in_executor(self._torch_thread, self._denoise, jobs)
        await asyncio.wait([denoising])
        if (error := denoising.exception()) is not None:
            self._lose(jobs, error)
            return
        self._measure(jobs, self._clock() - started)
        for job in jobs:
            if not job.cancelled:
                job.outbox.put_nowait(job.progress)
                self._drawing.show(job)
        self._line.over()

    def _denoise(self, jobs: Sequence[Job]) -> None:
        """On the torch thread: one call, or two where a guided image's rows are more than one takes."""
        self.adapters.activate(jobs[0].bucket.adapter)
        denoise(self.denoiser, [job.row for job in jobs], jobs[0].padded_rows)

    def _measure(self, jobs: Sequence[Job], seconds: float) -> None:
        self._failures = 0
        self.steps_taken += 1
        bucket, rows, width = jobs[0].bucket, sum(job.takes for job in jobs), jobs[0].padded_rows
        calls = math.ceil(rows / width)
        self._widths.took(bucket, calls, seconds)
        self.observer.stepped(bucket.width, bucket.height, rows, calls * width, seconds)

    def _lose(self, jobs: Sequence[Job], error: BaseException) -> None:
        """A step that failed takes its images with it and nobody else's."""
        self._failures += 1
        log.error("step failed, %d times in a row, with %d images", self._failures, len(jobs))
        failure = lost("Denoising failed.", error)
        for job in jobs:
            self._drawing.lose(job, failure)
        self._line.over(lost=jobs)
