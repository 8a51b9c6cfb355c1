"""The sides of the serving benchmark, each a process of its own with one thread of tensor operations.

``ours``, ``lock`` and ``batch`` answer OpenAI's generations over HTTP; ``bare`` answers at once. ``static`` and
``engine`` print figures.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.config import BatchConfig, LimitConfig
from serving.schemas import GenerationRequest, ImageReady
from tests.benchmarks.serving_trace import CLASSES, SIDES

WIDTHS = (1, 2, 4, 8, 16, 32)
_STATIC_STEPS = 20
BODY = json.dumps({"created": 0, "data": [{"b64_json": "A" * 1000, "seed": 0}]}).encode()
"""About what a small picture's answer holds."""


class Wanted(BaseModel):
    """A request as the peers read it."""

    prompt: str
    size: str
    seed: int
    num_inference_steps: int
    guidance_scale: float

    @property
    def kind(self) -> tuple[str, int, float]:
        """What one call of a pipeline can make of several requests at once."""
        return self.size, self.num_inference_steps, self.guidance_scale


class Pipeline:
    """The bundle as diffusers loads it."""

    def __init__(self, bundle: Path) -> None:
        from diffusers import DiffusionPipeline

        self._pipe = DiffusionPipeline.from_pretrained(str(bundle), trust_remote_code=True)
        self._pipe.set_progress_bar_config(disable=True)

    def make(self, wanted: Sequence[Wanted]) -> list[bytes]:
        """PNG files of requests of one kind, in one call."""
        first = wanted[0]
        self._pipe.unet.register_to_config(sample_size=int(first.size.partition("x")[0]))
        images = self._pipe(
            [each.prompt for each in wanted],
            num_inference_steps=first.num_inference_steps,
            guidance_scale=first.guidance_scale,
            generator=[torch.Generator().manual_seed(each.seed) for each in wanted],
        ).images
        return [_png(image) for image in images]

    def make_mixed(self, wanted: Sequence[Wanted]) -> list[bytes]:
        """PNG files of any requests, a call for each kind among them, the short ones first."""
        kinds: defaultdict[tuple[str, int, float], list[int]] = defaultdict(list)
        for place, each in enumerate(wanted):
            kinds[each.kind].append(place)
        files: dict[int, bytes] = {}
        for kind in sorted(kinds, key=lambda kind: kind[1]):
            made = self.make([wanted[place] for place in kinds[kind]])
            files |= dict(zip(kinds[kind], made, strict=True))
        return [files[place] for place in range(len(wanted))]


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _api(make: Callable[[Wanted], Awaitable[bytes]]) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/images/generations")
    async def generate(wanted: Wanted) -> dict[str, Any]:
        file = await make(wanted)
        return {"created": int(time.time()), "data": [{"b64_json": base64.b64encode(file).decode()}]}

    return app


def lock(bundle: Path) -> FastAPI:
    """One request after the other."""
    pipeline, turn = Pipeline(bundle), asyncio.Lock()

    async def make(wanted: Wanted) -> bytes:
        async with turn:
            return (await asyncio.to_thread(pipeline.make, [wanted]))[0]

    return _api(make)


def batch(bundle: Path, width: int) -> FastAPI:
    """Ray Serve's batching decorator, without its proxy: its requests come as fast as ours."""
    from ray.serve import batching

    # it looks at the replica around it to warn of a setting that there is none of here
    queue: Any = batching._BatchQueue
    queue._warn_if_max_batch_size_exceeds_max_ongoing_requests = lambda _: None
    pipeline = Pipeline(bundle)

    @batching.batch(max_batch_size=width, batch_wait_timeout_s=0.01)
    async def make(wanted: list[Wanted]) -> list[bytes]:
        return await asyncio.to_thread(pipeline.make_mixed, wanted)

    return _api(make)


def _engine(bundle: Path) -> tuple[Any, Any, Any]:
    from serving.config import PinnedModel, ServeConfig
    from serving.model import load_model
    from serving.telemetry import Telemetry
    from training.bundle import manifest_sha256

    pinned = PinnedModel(name=bundle.name, version=None, sha256=manifest_sha256(bundle))
    config = ServeConfig(
        model=str(bundle),
        pinned=pinned,
        cache=str(bundle.parent / "cache"),
        batch=BatchConfig(max_batch_rows=max(WIDTHS), max_waiting_images=100_000),
        limits=LimitConfig(max_pixels=max(SIDES) ** 2),
    )
    model = load_model(config)
    telemetry = Telemetry.of(model.card)
    return model.engine(config, telemetry.observer), model.card, telemetry


def ours(bundle: Path) -> ASGIApp:
    """The server as it is deployed, with its metrics and the widths that it measures for itself."""
    from serving.app import create_app

    engine, card, telemetry = _engine(bundle)
    return create_app(engine, card, LimitConfig(max_pixels=max(SIDES) ** 2), telemetry=telemetry)


async def bare(scope: Scope, receive: Receive, send: Send) -> None:
    """What uvicorn alone costs: the body is read, an answer of the same size is sent."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(BODY)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": BODY})


def static(bundle: Path) -> dict[str, Any]:
    """Seconds of one row of one step in the best full batch of equal requests, by side, and that batch's width."""
    pipeline = Pipeline(bundle)
    best: dict[str, Any] = {}
    for side in SIDES:
        row_s = {width: _row_s(pipeline, side, width) for width in WIDTHS}
        width = min(row_s, key=lambda each: row_s[each])
        best[str(side)] = {"width": width, "row_s": row_s[width], "table": row_s}
    return best


def _row_s(pipeline: Pipeline, side: int, width: int) -> float:
    wanted = [
        Wanted(
            prompt=CLASSES[number % len(CLASSES)],
            size=f"{side}x{side}",
            seed=number,
            num_inference_steps=_STATIC_STEPS,
            guidance_scale=1.0,
        )
        for number in range(width)
    ]
    taken = []
    for _ in range(4):
        started = time.perf_counter()
        pipeline.make(wanted)
        taken.append(time.perf_counter() - started)
    return min(taken[1:]) / (_STATIC_STEPS * width)


def engine_alone(bundle: Path, times: int) -> dict[str, float]:
    """Median seconds of a request of one step, without HTTP and without a file."""

    async def one(engine: Any, number: int) -> float:
        started = time.perf_counter()
        wanted = GenerationRequest(
            prompt=CLASSES[0], seed=number, steps=1, guidance_scale=1, width=SIDES[0], height=SIDES[0]
        )
        async with aclosing(engine.submit(wanted)) as events:
            async for event in events:
                if isinstance(event, ImageReady):
                    break
        return time.perf_counter() - started

    async def main() -> list[float]:
        engine, _, _ = _engine(bundle)
        async with engine:
            return [await one(engine, number) for number in range(times)]

    taken = sorted(asyncio.run(main())[5:])
    return {"p50_s": taken[len(taken) // 2]}


def main() -> None:
    """Serve, or print figures."""
    options = argparse.ArgumentParser()
    options.add_argument("side")
    options.add_argument("bundle", type=Path)
    options.add_argument("--port", type=int, default=0)
    options.add_argument("--width", type=int, default=8)
    told = options.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if told.side in {"static", "engine"}:
        found = static(told.bundle) if told.side == "static" else engine_alone(told.bundle, 300)
        print("FIGURES " + json.dumps(found))
        return
    apps: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(told.bundle),
        "lock": lambda: lock(told.bundle),
        "batch": lambda: batch(told.bundle, told.width),
        "bare": lambda: bare,
    }
    uvicorn.run(apps[told.side](), port=told.port, log_level="error", access_log=False)


if __name__ == "__main__":
    main()
