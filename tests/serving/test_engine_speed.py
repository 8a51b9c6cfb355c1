"""Every switch that makes pictures faster, and what it does to them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
import torch

from serving.config import BatchConfig
from serving.engine import Engine
from serving.errors import ServeError
from serving.fast_network import fast_network
from serving.prompt_cache import PromptCache
from serving.schemas import GenerationRequest, ImageReady
from serving.speed import SpeedConfig
from serving.step_cache import StepCache
from tests.serving.conftest import MAX_WORDS, TEXT_WIDTH, TINY
from training.canvas import Canvas
from training.conditioning import Conditioning, ConditioningShape
from training.objectives import Denoiser, RectifiedFlow
from training.precision import has_bf16

BATCH = BatchConfig(padded_rows=4)


class Counting:
    """A denoiser that counts its calls."""

    def __init__(self, whole: Denoiser) -> None:
        self.whole = whole
        self.calls = 0

    def __call__(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        self.calls += 1
        return self.whole(x, t, conditioning)

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return self.whole.alpha(t)

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return self.whole.sigma(t)


def request(**fields: Any) -> GenerationRequest:
    asked = {"prompt": "a red circle", "seed": 1, "steps": 20, "width": 8, "height": 8, "guidance_scale": 2.5}
    return GenerationRequest(**asked | fields)


def pictures(
    denoiser: Denoiser, encoder: Any, *wanted: GenerationRequest, speed: SpeedConfig | None = None
) -> tuple[list[np.ndarray], int]:
    """The pictures of requests that come at once, and the calls that they took."""

    async def picture(engine: Engine, one: GenerationRequest) -> np.ndarray:
        async with aclosing(engine.submit(one)) as events:
            found = [np.asarray(event.image) async for event in events if isinstance(event, ImageReady)]
        return found[0].astype(int)

    async def main() -> tuple[list[np.ndarray], int]:
        counting = Counting(denoiser)
        async with Engine(counting, encoder, canvas=Canvas(8), config=BATCH, speed=speed) as engine:
            before = counting.calls
            found = await asyncio.gather(*(picture(engine, one) for one in wanted))
            return found, counting.calls - before

    return asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_the_step_cache_leaves_evaluations_out_and_changes_pictures_by_a_little(
    denoiser: Denoiser, encoder: Any, sampler: str
) -> None:
    wanted = request(steps=50, sampler=sampler)
    (plain,), calls = pictures(denoiser, encoder, wanted)
    assert calls == 50
    (loose,), some = pictures(denoiser, encoder, wanted, speed=SpeedConfig(step_cache=0.05))
    (tight,), many = pictures(denoiser, encoder, wanted, speed=SpeedConfig(step_cache=0.005))
    assert some < many < 50
    assert some <= 30
    differences = [int(np.abs(each - plain).max()) for each in (tight, loose)]
    assert differences[0] <= differences[1] <= 24, differences


def test_with_the_step_cache_too_a_picture_does_not_depend_on_its_neighbours(denoiser: Denoiser, encoder: Any) -> None:
    speed = SpeedConfig(step_cache=0.05)
    others = [request(prompt=f"thing {seed}", seed=seed, steps=4 + 5 * seed) for seed in range(2, 8)]
    alone, _ = pictures(denoiser, encoder, request(), speed=speed)
    crowd, _ = pictures(denoiser, encoder, *others, request(), speed=speed)
    assert np.array_equal(alone[0], crowd[-1])


@pytest.mark.parametrize("sampler", ["heun", "ancestral", "lcm"])
def test_samplers_that_draw_or_correct_leave_nothing_out(denoiser: Denoiser, encoder: Any, sampler: str) -> None:
    wanted = request(sampler=sampler, steps=6)
    plain, calls = pictures(denoiser, encoder, wanted)
    cached, as_many = pictures(denoiser, encoder, wanted, speed=SpeedConfig(step_cache=1.0))
    assert calls == as_many
    assert np.array_equal(plain[0], cached[0])


def test_a_prediction_is_recalled_until_what_is_foretold_adds_up() -> None:
    cache = StepCache(0.25)
    x, clean = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    assert cache.recall(x) is None, "nothing is known yet"
    cache.keep(x, clean)
    assert cache.recall(x + 1) is None, "no rate of change is known yet"
    cache.keep(x + 1, clean + 0.1)  # a tenth of what the input moved
    known = cache.recall(x + 2)
    assert known is not None
    assert torch.equal(known, clean + 0.1)
    assert cache.recall(x + 3) is not None
    assert cache.recall(x + 4) is None, "three tenths are more than a quarter"
    assert cache.saved == 2


class CountingEncoder:
    """One that counts what it is asked to encode."""

    def __init__(self, whole: Any) -> None:
        self.whole = whole
        self.asked: list[str] = []
        self.hash = "counted"

    def check(self, prompt: str) -> None:
        self.whole.check(prompt)

    def encode(self, captions: Sequence[str]) -> Conditioning:
        self.asked.extend(captions)
        return self.whole.encode(captions)


def test_the_prompt_cache_changes_no_bit_and_encodes_a_prompt_once(denoiser: Denoiser, encoder: Any) -> None:
    wanted = [request(seed=seed) for seed in range(3)]
    plain, _ = pictures(denoiser, encoder, *wanted)
    counting = CountingEncoder(encoder)
    cached, _ = pictures(denoiser, counting, *wanted, speed=SpeedConfig(prompt_cache_bytes=1_000_000))
    assert all(np.array_equal(one, other) for one, other in zip(plain, cached, strict=True))
    assert counting.asked[-2:] == ["a red circle", ""], "and the empty one before, to warm up"
    assert len(counting.asked) - 2 <= 4


def test_the_prompt_cache_forgets_what_was_used_longest_ago_and_keeps_to_its_bytes(encoder: Any) -> None:
    counting = CountingEncoder(encoder)
    size = encoder.encode(["a"]).tokens.nbytes + encoder.encode(["a"]).mask.nbytes
    cache = PromptCache(2 * size)
    for prompt in ("a", "b", "a", "c", "a", "b"):
        assert torch.equal(cache.encode(counting, prompt, "cpu").tokens, encoder.encode([prompt]).tokens)
        assert cache.bytes <= 2 * size
    assert counting.asked == ["a", "b", "c", "b"]
    assert cache.hits == 2
    too_small = PromptCache(size - 1)
    too_small.encode(counting, "a", "cpu")
    assert too_small.bytes == 0
    counting.hash = "another encoder"
    before = len(counting.asked)
    cache.encode(counting, "b", "cpu")
    assert len(counting.asked) == before + 1


def network() -> Any:
    torch.manual_seed(0)
    return TINY.build(ConditioningShape("text", MAX_WORDS, TEXT_WIDTH)).eval().requires_grad_(False)


def fast(speed: SpeedConfig) -> Denoiser:
    return RectifiedFlow().denoiser(fast_network(network(), speed, device="cpu", variant=lambda: None))


@pytest.mark.skipif(not has_bf16(), reason="emulated here")
def test_bf16_changes_pictures_by_a_few_levels(denoiser: Denoiser, encoder: Any) -> None:
    (plain,), _ = pictures(denoiser, encoder, request())
    half = fast(SpeedConfig(bf16=True))
    (found,), _ = pictures(half, encoder, request())
    assert 0 < np.abs(found - plain).max() <= 8
    crowd, _ = pictures(half, encoder, request(prompt="b", steps=7), request(prompt="c", steps=3), request())
    assert np.array_equal(crowd[-1], found)


@pytest.mark.slow
def test_a_compiled_network_changes_pictures_by_one_level_at_most_and_they_depend_on_no_neighbour(
    denoiser: Denoiser, encoder: Any
) -> None:
    (plain,), _ = pictures(denoiser, encoder, request())
    compiled = fast(SpeedConfig(compiled=True))
    (found,), _ = pictures(compiled, encoder, request())
    assert np.abs(found - plain).max() <= 1
    crowd, _ = pictures(compiled, encoder, request(prompt="b", steps=7), request(prompt="c", steps=3), request())
    assert np.array_equal(crowd[-1], found)


def test_cuda_graphs_need_a_gpu() -> None:
    with pytest.raises(ServeError, match=r"speed\.cuda_graphs needs a GPU"):
        fast(SpeedConfig(cuda_graphs=True))


def test_all_of_it_is_off_by_default(denoiser: Denoiser, encoder: Any) -> None:
    assert not any(SpeedConfig().model_dump().values())
    (plain,), _ = pictures(denoiser, encoder, request())
    (found,), _ = pictures(fast(SpeedConfig()), encoder, request())
    assert np.array_equal(plain, found)
