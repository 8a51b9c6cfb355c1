"""Pictures of tensors, beside the loop that denoises: the network's next call does not wait for the autoencoder."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from serving.errors import EngineError
from serving.job import Job
from serving.lost import lost
from serving.schemas import ImageReady, Preview


class Drawing:
    """A thread that draws, and tells each picture's owner, in the order in which it was asked."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "draw")
        self._finishing: set[Job] = set()

    @property
    def finishing(self) -> int:
        """Images that are denoised and are being drawn."""
        return len(self._finishing)

    def show(self, job: Job) -> None:
        """Draw what there is to draw after an evaluation, if there is any."""
        final = job.row.trajectory.finished
        if (x := job.to_draw()) is None:
            return
        if final:
            self._finishing.add(job)
        self._later(job, partial(job.draw, x, final=final))

    def lose(self, job: Job, error: EngineError) -> None:
        """Tell an image's owner that it is lost, after the previews that are being drawn."""
        self._later(job, lambda: error)

    def close(self) -> None:
        """End the thread, once what it was asked for is drawn."""
        self._thread.shutdown()

    def _later(self, job: Job, make: Callable[[], ImageReady | Preview | EngineError]) -> None:
        drawn = asyncio.get_running_loop().run_in_executor(self._thread, make)
        drawn.add_done_callback(partial(self._drawn, job))

    def _drawn(self, job: Job, drawn: asyncio.Future[ImageReady | Preview | EngineError]) -> None:
        self._finishing.discard(job)
        if (error := drawn.exception()) is None:
            job.outbox.put_nowait(drawn.result())
            return
        job.outbox.put_nowait(lost("Drawing the picture failed.", error))
