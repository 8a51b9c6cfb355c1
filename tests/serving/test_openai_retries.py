"""The real OpenAI client's own retries: it comes back when the server says, and then gets its picture."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from openai import _base_client

from serving.app import create_app
from serving.config import BatchConfig, LimitConfig
from serving.engine import MAX_FAILURES, Engine
from serving.model import ModelCard
from tests.serving.live_server import serving, until
from training.canvas import Canvas
from training.objectives import Denoiser

CARD = ModelCard("tiny", 3, resolution=8, created=1_700_000_000, bundle_sha256="b" * 64)
LONG = {"num_inference_steps": 1_000_000}


@pytest.fixture
def engine(denoiser: Denoiser, encoder: Any) -> Engine:
    batch = BatchConfig(padded_rows=2, max_batch_rows=2, max_waiting_images=1)
    return Engine(denoiser, encoder, canvas=Canvas(8), config=batch)


@pytest.fixture
def url(engine: Engine) -> Iterator[str]:
    limits = LimitConfig(max_steps=1_000_000, default_steps=2, max_images_per_request=1)
    with serving(create_app(engine, CARD, limits)) as port:
        yield f"http://127.0.0.1:{port}/v1"


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], list[float]]:
    """Takes the place of the client's waiting: notes how long it would wait, and does something meanwhile."""

    def record(meanwhile: Callable[[], None]) -> list[float]:
        waits: list[float] = []

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            meanwhile()

        monkeypatch.setattr(_base_client, "time", SimpleNamespace(**{**vars(time), "sleep": sleep}))
        return waits

    return record


def test_a_full_queue_is_waited_for_as_long_as_it_says(
    url: str, engine: Engine, slept: Callable[[Callable[[], None]], list[float]]
) -> None:
    leave = threading.Event()

    async def occupy() -> None:
        async def one() -> None:
            # without a timeout: what cannot be in time is refused
            async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=None) as client:
                await client.images.generate(prompt="a red circle", extra_body=LONG)

        task = asyncio.create_task(one())
        await asyncio.to_thread(leave.wait)
        task.cancel()
        await asyncio.wait([task])

    crowd = threading.Thread(target=asyncio.run, args=(occupy(),))
    crowd.start()
    until(lambda: engine.steps_taken > 2)  # what is left is known to be more than may wait

    def gone() -> None:
        leave.set()
        crowd.join()
        until(lambda: not engine.running_images + engine.waiting_images)

    waits = slept(gone)
    try:
        with openai.OpenAI(base_url=url, api_key="any", max_retries=2) as client:
            answer = client.images.generate(prompt="a red circle")
    finally:
        leave.set()
        crowd.join()
    assert answer.data is not None
    assert len(waits) == 1
    assert 1 <= waits[0] <= 120
    assert waits[0] == int(waits[0]), "the header's whole seconds, and not the client's own guess"


def test_a_broken_replica_is_asked_again_and_the_last_refusal_is_told(
    url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch, slept: Callable[[Callable[[], None]], list[float]]
) -> None:
    monkeypatch.setattr(engine, "_failures", MAX_FAILURES)
    waits = slept(lambda: None)
    with openai.OpenAI(base_url=url, api_key="any", max_retries=2) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.images.generate(prompt="a red circle")
        assert (caught.value.status_code, caught.value.code) == (503, "engine_error")
        assert caught.value.request_id
        assert waits == [1.0, 1.0]
        slept(lambda: monkeypatch.setattr(engine, "_failures", 0))
        assert client.images.generate(prompt="a red circle").data


def test_what_is_wrong_is_not_asked_twice(url: str, slept: Callable[[Callable[[], None]], list[float]]) -> None:
    waits = slept(lambda: None)
    with openai.OpenAI(base_url=url, api_key="any", max_retries=2) as client:
        with pytest.raises(openai.BadRequestError):
            client.images.generate(prompt="a red circle", size="1024x1024")
        with pytest.raises(openai.NotFoundError):
            client.images.edit(prompt="a red circle", image=b"no picture", model="none")
        with pytest.raises(openai.BadRequestError):
            client.images.create_variation(image=b"no picture")
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("none")
    assert waits == []
