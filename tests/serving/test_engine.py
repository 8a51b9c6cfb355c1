"""The engine: pictures that do not depend on their neighbours, cancellation, mixed requests, a bounded queue."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from serving.batching import Row, denoise
from serving.config import BatchConfig
from serving.engine import Engine
from serving.errors import EngineError, QueueFullError, RequestError
from serving.job import to_picture
from serving.schemas import GenerationRequest, ImageReady, Progress, Queued
from serving.start import Kept
from training import noise
from training.canvas import Canvas
from training.conditioning import Conditioning
from training.objectives import Denoiser, RectifiedFlow
from training.samplers import Guided, Trajectory, sample, times
from training.sampling_config import SAMPLERS, SamplerName

BATCH = BatchConfig(padded_rows=4, max_batch_rows=8, max_waiting_images=16)


def request(prompt: str = "a red circle", **fields: Any) -> GenerationRequest:
    return GenerationRequest(
        **{"prompt": prompt, "seed": 1, "steps": 4, "width": 8, "height": 8, "guidance_scale": 2.5, **fields}
    )


async def pictures(engine: Engine, wanted: GenerationRequest) -> list[np.ndarray]:
    found = {}
    async with aclosing(engine.submit(wanted)) as events:
        async for event in events:
            if isinstance(event, ImageReady):
                found[event.index] = np.asarray(event.image)
    return [found[index] for index in sorted(found)]


@pytest.fixture
def run(denoiser: Denoiser, encoder: Any) -> Callable[..., Any]:
    def run(scenario: Callable[[Engine], Coroutine[Any, Any, Any]], config: BatchConfig = BATCH) -> Any:
        async def main() -> Any:
            async with Engine(denoiser, encoder, canvas=Canvas(8), config=config) as engine:
                return await asyncio.wait_for(scenario(engine), 60)

        return asyncio.run(main())

    return run


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_row_is_bit_identical_whoever_shares_its_batch(
    denoiser: Denoiser, encoder: Any, sampler: SamplerName
) -> None:
    def row(seed: int, steps: int, scale: float, sampler: SamplerName = "euler") -> Row:
        both = encoder.encode([f"word{seed} other", ""])
        negative = both.rows(slice(1, 2)) if scale != 1 else None
        x = noise.normal(seed, "serve", shape=(3, 8, 8))
        return Row(Trajectory(x, times(steps), sampler, seed), both.rows(slice(0, 1)), negative, scale)

    alone = row(7, 3, 3.0, sampler)
    while not alone.trajectory.finished:
        denoise(denoiser, [alone], 4)
    draw = noise.generator(0, "neighbours")
    for _ in range(14):  # with each of the samplers, three batches and more: 210 compositions
        chosen = row(7, 3, 3.0, sampler)
        neighbours: list[Row] = []
        while not chosen.trajectory.finished:
            neighbours = [other for other in neighbours if not other.trajectory.finished and draw.random() > 0.2]
            while len(neighbours) < 5 and draw.random() < 0.7:
                seed, steps = int(draw.integers(100)), int(draw.integers(1, 9))
                other = SAMPLERS[int(draw.integers(len(SAMPLERS)))]
                neighbours.append(row(seed, steps, float(draw.choice([1.0, 2.0])), other))
            batch = [*neighbours]
            batch.insert(int(draw.integers(len(batch) + 1)), chosen)
            denoise(denoiser, batch, 4)
        assert torch.equal(chosen.trajectory.x, alone.trajectory.x)


def test_a_request_alone_and_in_a_crowd_gives_the_same_bits(run: Callable[..., Any]) -> None:
    wanted = request(seed=11, steps=6)

    async def alone(engine: Engine) -> Any:
        return await pictures(engine, wanted)

    async def crowd(engine: Engine) -> Any:
        others = [request(f"thing {i}", seed=i, steps=1 + i, guidance_scale=1 + i % 2) for i in range(6)]
        results = await asyncio.gather(*(pictures(engine, each) for each in [*others, wanted]))
        return results[-1]

    expected, found = run(alone), run(crowd)
    assert len(expected) == 1
    assert expected[0].shape == (8, 8, 3)
    assert np.array_equal(expected[0], found[0])


def test_the_engine_agrees_with_the_sampler(run: Callable[..., Any], denoiser: Denoiser, encoder: Any) -> None:
    both = encoder.encode(["a red circle", "blue"])
    start = noise.normal(5, "serve", shape=(3, 8, 8))[None]
    for sampler, scale in itertools.product(SAMPLERS, (1.0, 2.5)):
        guided = Guided(denoiser, both.rows(slice(1, 2)), torch.tensor([scale]))
        expected = np.asarray(
            to_picture(sample(guided, start, both.rows(slice(0, 1)), times(4), sampler=sampler, seeds=[5])[0])
        )
        wanted = request(seed=5, negative_prompt="blue", guidance_scale=scale, sampler=sampler)
        found = run(lambda engine, wanted=wanted: pictures(engine, wanted))[0]
        assert np.abs(expected.astype(int) - found.astype(int)).max() <= 1


def test_guidance_scale_one_ignores_the_negative_prompt(run: Callable[..., Any]) -> None:
    with_negative = run(lambda engine: pictures(engine, request(guidance_scale=1, negative_prompt="blue")))
    without = run(lambda engine: pictures(engine, request(guidance_scale=1)))
    assert np.array_equal(with_negative[0], without[0])


def test_image_i_of_a_request_is_the_image_of_seed_plus_i(run: Callable[..., Any]) -> None:
    three = run(lambda engine: pictures(engine, request(seed=20, images=3)))
    second = run(lambda engine: pictures(engine, request(seed=21)))
    assert len(three) == 3
    assert np.array_equal(three[1], second[0])
    assert not np.array_equal(three[0], three[1])


def test_events_come_in_order_and_short_requests_overtake_long_ones(run: Callable[..., Any]) -> None:
    async def scenario(engine: Engine) -> Any:
        finished: list[str] = []

        async def follow(name: str, steps: int) -> list[Any]:
            seen = [event async for event in engine.submit(request(name, steps=steps))]
            finished.append(name)
            return seen

        events, _ = await asyncio.gather(follow("long", 30), follow("short", 3))
        return finished, events

    finished, events = run(scenario)
    assert finished == ["short", "long"]
    assert isinstance(events[0], Queued)
    assert events[0].prompt_tokens == 2
    assert [event.step for event in events[1:-1] if isinstance(event, Progress)] == list(range(1, 31))
    assert isinstance(events[-1], ImageReady)
    assert isinstance(events[-1].image, Image.Image)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_an_edit_keeps_survives_what_the_network_makes_beside_it(encoder: Any, sampler: SamplerName) -> None:
    """Also where the network is broken by it: a sum with a weight of 0 would not."""
    broken = RectifiedFlow().denoiser(lambda x, *_: torch.full_like(x, torch.nan))
    clean, drawn = (noise.normal(0, name, shape=(3, 8, 8)).clamp(-1, 1) for name in ("clean", "drawn"))
    kept = Kept(clean, drawn, torch.zeros(1, 8, 8, dtype=torch.bool))
    row = Row(Trajectory(drawn, times(4), sampler), encoder.encode(["a"]), None, 1.0, kept)
    while not row.trajectory.finished:
        denoise(broken, [row], 2)
        t = row.trajectory.t
        assert torch.equal(row.trajectory.x, (1 - t) * clean + t * drawn)
        assert row.clean is not None
        assert torch.equal(row.clean, clean)
    assert torch.equal(row.trajectory.x, clean)


def test_closing_a_request_frees_its_rows_within_one_step(run: Callable[..., Any]) -> None:
    async def scenario(engine: Engine) -> tuple[int, int, int]:
        events = engine.submit(request(steps=100_000, images=4))
        async for event in events:
            if isinstance(event, Progress) and event.step == 2:
                break
        running, before = engine.running_images, engine.steps_taken
        await events.aclose()
        while engine.running_images:
            await asyncio.sleep(0)
        return running, engine.steps_taken - before, engine.waiting_images

    assert run(scenario) == (2, 1, 0)


def test_a_cancelled_task_frees_the_rows_that_still_wait(run: Callable[..., Any]) -> None:
    async def scenario(engine: Engine) -> Any:
        blocker = asyncio.create_task(pictures(engine, request(steps=100_000, images=4)))
        waiter = asyncio.create_task(pictures(engine, request(images=5)))
        while engine.running_images < 2 or engine.waiting_images < 7:
            await asyncio.sleep(0)
        waiter.cancel()
        blocker.cancel()
        await asyncio.gather(waiter, blocker, return_exceptions=True)
        return len(await pictures(engine, request()))

    assert run(scenario) == 1


def test_who_leaves_the_queue_s_middle_gives_its_places_back_at_once(run: Callable[..., Any]) -> None:
    async def scenario(engine: Engine) -> Any:
        blocker = asyncio.create_task(pictures(engine, request(steps=100_000, images=4)))
        while engine.running_images < 2 or not engine.steps_taken:
            await asyncio.sleep(0)
        head = asyncio.create_task(pictures(engine, request(images=1, steps=100_000)))
        while engine.waiting_images < 3:
            await asyncio.sleep(0)
        before = engine.retry_after_s()
        middle = asyncio.create_task(pictures(engine, request(images=13, steps=100_000)))
        while engine._line.encoding or engine.waiting_images < 16:
            await asyncio.sleep(0)
        busy = engine.retry_after_s()
        middle.cancel()
        await asyncio.gather(middle, return_exceptions=True)
        places, wait = engine.waiting_images, engine.retry_after_s()
        async with aclosing(engine.submit(request(images=13))) as events:
            queued = await anext(events)
        for task in (head, blocker):
            assert not task.done(), "both have been in the engine all the time"
            task.cancel()
        await asyncio.gather(head, blocker, return_exceptions=True)
        return places, queued, before <= busy and wait <= busy

    assert run(scenario) == (3, Queued(3, 4), True)


def test_a_full_queue_is_a_typed_error_with_a_computed_wait(run: Callable[..., Any]) -> None:
    async def scenario(engine: Engine) -> Any:
        blocker = asyncio.create_task(pictures(engine, request(steps=100_000, images=4)))
        while engine.running_images < 2 or not engine.steps_taken:
            await asyncio.sleep(0)
        with pytest.raises(QueueFullError) as caught:
            await pictures(engine, request(images=17))
        blocker.cancel()
        await asyncio.gather(blocker, return_exceptions=True)
        return caught.value

    error = run(scenario)
    assert 1 <= error.retry_after_s <= 120
    assert "at most 16 images wait" in str(error)
    assert f"ask again in {error.retry_after_s} s" in str(error)


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"width": 16}, "size", "makes images of 8x8"),
        ({"prompt": "word " * 40}, "prompt", "has 41 tokens"),
        ({"negative_prompt": "word " * 40}, "negative_prompt", "has 41 tokens"),
    ],
)
def test_impossible_requests_name_the_field(
    run: Callable[..., Any], fields: dict[str, Any], param: str, text: str
) -> None:
    async def scenario(engine: Engine) -> Any:
        with pytest.raises(RequestError) as caught:
            await pictures(engine, request(**fields))
        return caught.value, engine.waiting_images

    error, waiting = run(scenario)
    assert error.param == param
    assert text in str(error)
    assert waiting == 0


class Fragile:
    """A denoiser whose device can be lost."""

    def __init__(self, whole: Denoiser) -> None:
        self.whole = whole
        self.broken = False

    def __call__(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        if self.broken:
            raise RuntimeError("out of memory")
        return self.whole(x, t, conditioning)

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return self.whole.alpha(t)

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return self.whole.sigma(t)


def test_a_failing_step_loses_its_own_requests_only_and_its_cause_is_for_the_log(
    denoiser: Denoiser, encoder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fragile = Fragile(denoiser)

    async def main() -> int:
        async with Engine(fragile, encoder, canvas=Canvas(8), config=BATCH) as engine:
            fragile.broken = True
            with pytest.raises(EngineError) as caught:
                await pictures(engine, request())
            assert str(caught.value).startswith("Denoising failed.")
            assert "out of memory" not in str(caught.value)
            fragile.broken = False
            return len(await pictures(engine, request()))

    with caplog.at_level(logging.ERROR, "serving.engine"):
        assert asyncio.run(main()) == 1
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == ["out of memory"]


def test_an_engine_that_fails_again_and_again_is_not_ready(denoiser: Denoiser, encoder: Any) -> None:
    fragile = Fragile(denoiser)

    async def main() -> list[bool]:
        seen = []
        async with Engine(fragile, encoder, canvas=Canvas(8), config=BATCH) as engine:
            for broken in (True, True, False, True, True, True):
                fragile.broken = broken
                await asyncio.gather(pictures(engine, request()), return_exceptions=True)
                seen.append(engine.ready)
            with pytest.raises(EngineError, match="not running"):
                await pictures(engine, request())
        return seen

    assert asyncio.run(main()) == [True, True, True, True, True, False]


def test_a_prompt_that_is_encoded_while_the_engine_stops_is_answered(denoiser: Denoiser, encoder: Any) -> None:
    started, release, released = threading.Event(), threading.Event(), []

    class Slow:
        encode = encoder.encode
        hash = encoder.hash

        def check(self, _: str) -> None:
            started.set()
            released.append(release.wait(10))

    async def main() -> None:
        async with Engine(denoiser, Slow(), canvas=Canvas(8), config=BATCH) as engine:
            task = asyncio.create_task(pictures(engine, request()))
            while not started.is_set():
                await asyncio.sleep(0)
            asyncio.get_running_loop().call_later(0.2, release.set)
        with pytest.raises(EngineError, match="not running"):
            await asyncio.wait_for(task, 20)

    asyncio.run(main())
    assert released[0], "the event loop went on while the engine waited for its threads"


def test_stopping_the_engine_tells_those_who_wait(denoiser: Denoiser, encoder: Any) -> None:
    async def main() -> None:
        async with Engine(denoiser, encoder, canvas=Canvas(8), config=BATCH) as engine:
            task = asyncio.create_task(pictures(engine, request(steps=100_000)))
            while not engine.running_images:
                await asyncio.sleep(0)
        with pytest.raises(EngineError, match="stopping"):
            await task
        assert not engine.ready
        with pytest.raises(EngineError, match="not running"):
            await pictures(engine, request())

    asyncio.run(main())
