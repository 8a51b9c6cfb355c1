"""The engine's promises about time, and what it tells whoever watches it."""

from __future__ import annotations

import asyncio
import pickle
from contextlib import aclosing, suppress
from typing import Any

import pytest

from serving.config import BatchConfig
from serving.engine import Engine
from serving.errors import DeadlineError, EngineError, QueueFullError, RequestError
from serving.schemas import GenerationRequest, ImageReady, Progress
from training.canvas import Canvas
from training.objectives import Denoiser

BATCH = BatchConfig(padded_rows=2, max_waiting_images=8)


def request(**fields: Any) -> GenerationRequest:
    asked = {"prompt": "a", "seed": 1, "steps": 4, "width": 8, "height": 8, "guidance_scale": 2.5}
    return GenerationRequest(**asked | fields)


class Watch:
    """An observer that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.steps: list[tuple[int, ...]] = []
        self.queue: list[tuple[int, int]] = []

    def accepted(self, request: GenerationRequest) -> None:
        self.told.append(("accepted", request.prompt))

    def rejected(self, reason: str) -> None:
        self.told.append(("rejected", reason))

    def stepped(self, width: int, height: int, rows: int, padded_rows: int, seconds: float) -> None:
        assert seconds >= 0
        self.steps.append((width, height, rows, padded_rows))

    def previewed(self, request: GenerationRequest, seconds_since_accepted: float) -> None:
        assert seconds_since_accepted >= 0
        self.told.append(("previewed", request.prompt))

    def finished(self, request: GenerationRequest, seconds: float, outcome: str) -> None:
        assert seconds >= 0
        self.told.append(("finished", request.prompt, outcome))

    def waiting(self, images: int, running: int) -> None:
        self.queue.append((images, running))


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def drain(engine: Engine, wanted: GenerationRequest) -> int:
    async with aclosing(engine.submit(wanted)) as events:
        return len([event async for event in events if isinstance(event, ImageReady)])


def test_who_cannot_be_in_time_is_refused_at_once_with_what_it_would_take(denoiser: Denoiser, encoder: Any) -> None:
    watch = Watch()

    async def main() -> Any:
        async with Engine(denoiser, encoder, canvas=Canvas(8), config=BATCH, observer=watch) as engine:
            with pytest.raises(DeadlineError) as caught:
                await drain(engine, request(steps=1_000_000, deadline_s=0.5))
            assert engine.waiting_images == 0
            assert await drain(engine, request(deadline_s=60)) == 1
            return caught.value

    error = asyncio.run(main())
    assert error.needed_s > 0.5
    assert "cannot be made before the deadline" in str(error)
    assert "'0.5 s'" in str(error)
    assert "ask for fewer steps" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301 - ours
    assert watch.told == [("rejected", "deadline"), ("accepted", "a"), ("finished", "a", "done")]


def test_a_deadline_that_passes_frees_the_rows_of_all_its_images(denoiser: Denoiser, encoder: Any) -> None:
    clock, watch = Clock(), Watch()

    async def main() -> int:
        engine = Engine(denoiser, encoder, canvas=Canvas(8), config=BATCH, observer=watch, clock=clock)
        async with engine:
            with pytest.raises(DeadlineError):  # noqa: PT012
                async with aclosing(engine.submit(request(steps=5000, images=3, deadline_s=1e6))) as events:
                    async for event in events:
                        if isinstance(event, Progress) and event.step == 3:
                            clock.now = 2e6
            assert await drain(engine, request(prompt="b")) == 1
            return engine.waiting_images + engine.running_images

    assert asyncio.run(asyncio.wait_for(main(), 60)) == 0
    assert watch.told == [
        ("accepted", "a"),
        ("finished", "a", "expired"),
        ("accepted", "b"),
        ("finished", "b", "done"),
    ]


def test_the_urgent_overtake_the_patient(denoiser: Denoiser, encoder: Any) -> None:
    async def main() -> list[str]:
        finished: list[str] = []

        async def follow(name: str, priority: int) -> None:
            await drain(engine, request(prompt=name, steps=15, priority=priority))
            finished.append(name)

        async with Engine(denoiser, encoder, canvas=Canvas(8), config=BATCH) as engine:
            await asyncio.gather(*(follow(f"patient {number}", 9) for number in range(3)), follow("urgent", 0))
        return finished

    assert asyncio.run(asyncio.wait_for(main(), 60))[0] == "urgent"


def test_an_observer_is_told_everything_once(denoiser: Denoiser, encoder: Any) -> None:
    watch = Watch()

    async def main() -> None:
        async with Engine(denoiser, encoder, canvas=Canvas(8), config=BATCH, observer=watch) as engine:
            await drain(engine, request(previews=1))
            await drain(engine, request(guidance_scale=1.0))
            while (0, 0) not in watch.queue:
                await asyncio.sleep(0)
            for wrong, kind in ((request(width=16), RequestError), (request(images=9), QueueFullError)):
                with pytest.raises(kind):
                    await drain(engine, wrong)
            with pytest.raises(RequestError):
                await drain(engine, request(prompt="word " * 40))
            events = engine.submit(request(prompt="leaves", steps=5000))
            async for event in events:
                if isinstance(event, Progress):
                    break
            await events.aclose()
            lost = asyncio.create_task(drain(engine, request(prompt="lost", steps=100_000)))
            while ("accepted", "lost") not in watch.told:
                await asyncio.sleep(0)
        with suppress(EngineError):
            await lost
        with pytest.raises(EngineError):
            await drain(engine, request())

    asyncio.run(asyncio.wait_for(main(), 60))
    assert watch.told == [
        ("accepted", "a"),
        ("previewed", "a"),
        ("finished", "a", "done"),
        ("accepted", "a"),
        ("finished", "a", "done"),
        ("rejected", "invalid"),
        ("rejected", "queue_full"),
        ("rejected", "invalid"),
        ("accepted", "leaves"),
        ("finished", "leaves", "cancelled"),
        ("accepted", "lost"),
        ("finished", "lost", "failed"),
        ("rejected", "stopping"),
    ]
    assert watch.steps[:8] == [(8, 8, 2, 2)] * 4 + [(8, 8, 1, 2)] * 4
    assert (0, 1) in watch.queue
