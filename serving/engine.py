"""The engine: continuous, step-level batching over the denoiser contract.

The life of a request: ``submit`` reserves places in the queue, the text thread encodes the prompt and draws the
noise, the rows wait; at every step the loop admits, denoises and retires rows; the images come back as events.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, Self

import torch

from serving.batching import Row, denoise
from serving.config import BatchConfig
from serving.errors import EngineError, QueueFullError, RequestError
from serving.job import Job, preview_steps
from serving.schemas import Event, GenerationRequest, ImageReady, Queued
from serving.start import begin
from training.canvas import Canvas
from training.conditioning import Conditioning
from training.errors import UsageError
from training.objectives import Denoiser
from training.samplers import times

MAX_RETRY_AFTER_S = 120
"""Clients give up above this."""
MAX_FAILURES = 3
"""Steps that fail one after the other until the engine counts as broken: a lost device does not come back."""

log = logging.getLogger(__name__)


class Encoder(Protocol):
    """What turns prompts into conditioning; ``training.conditioning.TextEncoder`` is one."""

    def check(self, prompt: str) -> None:
        """Refuse, with a ``UsageError``, a prompt that would be cut."""

    def encode(self, captions: Sequence[str]) -> Conditioning:
        """One row per caption; ``""`` is the unconditional caption."""
        ...


class Engine:
    """The only owner of a replica's accelerator.

    Use it as ``async with engine:``; requests are accepted inside.

    Args:
        denoiser: the model.
        encoder: prompts to conditioning.
        canvas: where the model draws; its autoencoder, if there is one, is where the denoiser's weights are.
        config: how the network is filled.
        grid: the times of so many steps, as the model's objective gives them.
        device: where the denoiser's weights are.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        encoder: Encoder,
        *,
        canvas: Canvas,
        config: BatchConfig,
        grid: Callable[[int], torch.Tensor] = times,
        device: str = "cpu",
    ) -> None:
        self.denoiser = denoiser
        self.encoder = encoder
        self.canvas = canvas
        self.grid = grid
        self.config = config
        self.device = device
        self.steps_taken = 0
        self._failures = 0
        self._encoding = 0
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._work = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._row_step_s = 0.0

    async def __aenter__(self) -> Self:
        self._torch_thread = ThreadPoolExecutor(1, "denoise")
        self._text_thread = ThreadPoolExecutor(1, "encode")
        self._loop = asyncio.create_task(self._serve(), name="engine")
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.wait([self._loop])
        # they wait for what runs, and the callers of a prompt that is being encoded need this loop meanwhile
        await asyncio.to_thread(self._torch_thread.shutdown)
        await asyncio.to_thread(self._text_thread.shutdown)

    @property
    def ready(self) -> bool:
        """Whether requests are accepted and denoised; not once ``MAX_FAILURES`` steps have failed in a row."""
        return self._loop is not None and not self._loop.done() and self._failures < MAX_FAILURES

    @property
    def running_images(self) -> int:
        """Images that are being denoised."""
        return len(self._running)

    @property
    def waiting_images(self) -> int:
        """Images that were accepted and are not being denoised yet."""
        return self._encoding + len(self._waiting)

    async def submit(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Make the request's images; closing the generator frees their rows within one step.

        Raises:
            RequestError: the prompt is too long or the model cannot make that size.
            QueueFullError: too many images wait already.
            EngineError: denoising failed or the engine is stopping.
        """
        self._check(request)
        self._encoding += request.images
        try:
            jobs, prompt_tokens = await asyncio.get_running_loop().run_in_executor(
                self._text_thread, self._prepare, request
            )
        finally:
            self._encoding -= request.images
        if not self.ready:  # it stopped meanwhile, and nobody would serve the queue
            raise _not_running()
        queued = Queued(self.waiting_images, prompt_tokens)
        self._waiting.extend(jobs)
        self._work.set()
        try:
            yield queued
            unfinished = len(jobs)
            while unfinished:
                event = await jobs[0].outbox.get()
                if isinstance(event, EngineError):
                    raise event
                unfinished -= isinstance(event, ImageReady)
                yield event
        finally:
            for job in jobs:
                job.cancelled = True
            # at once and not when their turn comes: places, waits and counts are of those who still want a picture
            self._waiting = deque(job for job in self._waiting if not job.cancelled)
            self._work.set()

    async def _serve(self) -> None:
        try:
            while True:
                await self._work.wait()
                await self._step()
                if not self._running and not self._waiting:
                    self._work.clear()
        except Exception:
            log.exception("the engine has died")
            raise
        finally:
            stopped = EngineError("The server is stopping.", mend="send the request again")
            for job in [*self._running, *self._waiting]:
                job.outbox.put_nowait(stopped)
            self._running.clear()
            self._waiting.clear()

    async def _step(self) -> None:
        """One iteration: schedule, denoise, retire."""
        self._schedule()
        if not self._running:
            return
        started = time.monotonic()
        jobs = list(self._running)
        denoising = asyncio.get_running_loop().run_in_executor(self._torch_thread, self._denoise, jobs)
        await asyncio.wait([denoising])
        if (error := denoising.exception()) is not None:
            self._fail(jobs, error)
            return
        self._failures = 0
        self.steps_taken += 1
        self._retire()
        self._measure(time.monotonic() - started, sum(job.row.width for job in jobs))

    def _schedule(self) -> None:
        """Drop cancelled rows, admit waiting ones, first come first served."""
        self._running = [job for job in self._running if not job.cancelled]
        free = self.config.max_batch_rows - sum(job.row.width for job in self._running)
        while self._waiting and self._waiting[0].row.width <= free:
            job = self._waiting.popleft()
            self._running.append(job)
            free -= job.row.width

    def _denoise(self, jobs: list[Job]) -> None:
        """On the torch thread: one step, and the pictures of the rows that it finished."""
        denoise(self.denoiser, [job.row for job in jobs], self.config.padded_rows)
        for job in jobs:
            job.draw()

    def _retire(self) -> None:
        """Tell every row's owner how far it is; finished rows leave."""
        for job in self._running:
            for event in job.news():
                job.outbox.put_nowait(event)
        self._running = [job for job in self._running if job.image is None]

    def _fail(self, jobs: list[Job], error: BaseException) -> None:
        """A step that failed takes its rows with it and nobody else's; its words are for the log, not for clients."""
        self._failures += 1
        log.error("denoising failed, %d times in a row, with %d rows", self._failures, len(jobs), exc_info=error)
        failure = EngineError("Denoising failed.", mend="send the request again; the server's log has the cause")
        failure.__cause__ = error
        for job in jobs:
            job.outbox.put_nowait(failure)
        self._running = []

    def _check(self, request: GenerationRequest) -> None:
        if not self.ready:
            raise _not_running()
        resolution = self.canvas.resolution
        if request.size != resolution:
            error = UsageError(
                f"This model makes images of {resolution}x{resolution} pixels.",
                value=f"{request.size}x{request.size}",
                rule="the size that the model was trained at",
                options=[f"{resolution}x{resolution}", "auto"],
            )
            raise RequestError(error, param="size")
        if self.waiting_images + request.images > self.config.max_waiting_images:
            raise QueueFullError(self.waiting_images, self.config.max_waiting_images, self.retry_after_s())

    def _prepare(self, request: GenerationRequest) -> tuple[list[Job], int]:
        """On the text thread: conditioning and noise, both functions of the request alone."""
        for param in ("prompt", "negative_prompt"):
            try:
                self.encoder.check(getattr(request, param))
            except UsageError as error:
                raise RequestError(error, param=param) from error
        both = self.encoder.encode([request.prompt, request.negative_prompt])
        prompt_tokens = int(both.mask[0].sum())
        both = both.to(self.device)
        guided = request.guidance_scale != 1
        outbox: asyncio.Queue[Event | EngineError] = asyncio.Queue()
        jobs = []
        for index in range(request.images):
            seed = request.seed + index
            grid = self.grid(request.steps)
            trajectory, kept = begin(request, seed, self.denoiser, grid, self.canvas, device=self.device)
            negative = both.rows(slice(1, 2)) if guided else None
            row = Row(trajectory, both.rows(slice(0, 1)), negative, request.guidance_scale, kept)
            previews = preview_steps(request.steps_left, request.previews)
            jobs.append(Job(index, seed, row, outbox, previews, self.canvas))
        return jobs, prompt_tokens

    def _measure(self, seconds: float, rows: int) -> None:
        """Keep a running mean of what one row's step costs."""
        latest = seconds / rows
        self._row_step_s = latest if not self._row_step_s else 0.9 * self._row_step_s + 0.1 * latest

    def retry_after_s(self) -> int:
        """Seconds until the work that is here now is done, from the measured cost of a row's step."""
        wanted = [job for job in [*self._running, *self._waiting] if not job.cancelled]
        work = sum(job.row.trajectory.evaluations_left * job.row.width for job in wanted)
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(work * self._row_step_s)))


def _not_running() -> EngineError:
    return EngineError("The engine is not running.", mend="send the request again")
