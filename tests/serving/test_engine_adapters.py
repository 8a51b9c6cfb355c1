"""LoRAs by name: beside one network, in calls of their own, without a trace in anybody else's picture."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from serving.adapters import Adapters, adapter_path
from serving.config import BatchConfig, ServeConfig
from serving.engine import Engine
from serving.errors import RequestError, ServeError
from serving.schemas import GenerationRequest, ImageReady
from tests.serving.conftest import MAX_WORDS, TEXT_WIDTH, TINY
from training.canvas import Canvas
from training.conditioning import ConditioningShape
from training.finetune.adapters import FILE, merge_adapter
from training.models import apply
from training.objectives import RectifiedFlow

BATCH = BatchConfig(padded_rows=4)


def network() -> Any:
    torch.manual_seed(0)
    return TINY.build(ConditioningShape("text", MAX_WORDS, TEXT_WIDTH)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of the tiny network, in diffusers' format; one lies in a run's bundle."""
    folder = tmp_path_factory.mktemp("adapters")
    layers = {name: module for name, module in network().named_modules() if isinstance(module, torch.nn.Linear)}
    ends = {"sepia": "to_q", "keys": "to_k"}
    found = {}
    for number, (name, end) in enumerate(ends.items()):
        draw = torch.Generator().manual_seed(number)
        state = {}
        for layer, module in layers.items():
            if layer.endswith(end):
                state[f"unet.{layer}.lora_A.weight"] = torch.randn(2, module.in_features, generator=draw)
                state[f"unet.{layer}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=draw)
        assert state
        place = folder / name / ("adapter" if name == "keys" else "")
        place.mkdir(parents=True)
        save_file(state, place / FILE)
        found[name] = folder / name
    return found


def pictures(unet: Any, adapters: Adapters, encoder: Any, *names: str | None, **fields: Any) -> list[np.ndarray]:
    """One picture with each of the adapters, asked for at once."""
    asked = {"prompt": "a red circle", "seed": 3, "steps": 4, "width": 8, "height": 8, "guidance_scale": 2.0, **fields}

    async def picture(engine: Engine, name: str | None) -> np.ndarray:
        async with aclosing(engine.submit(GenerationRequest(**asked, adapter=name))) as events:
            found = [np.asarray(event.image) async for event in events if isinstance(event, ImageReady)]
        return found[0]

    async def main() -> list[np.ndarray]:
        denoiser = RectifiedFlow().denoiser(partial(apply, unet))
        async with Engine(denoiser, encoder, canvas=Canvas(8), config=BATCH, adapters=adapters) as engine:
            return await asyncio.gather(*(picture(engine, name) for name in names))

    return asyncio.run(asyncio.wait_for(main(), 60))


def test_every_picture_has_its_own_adapter_and_the_others_leave_no_trace(places: dict[str, Path], encoder: Any) -> None:
    plain = pictures(network(), Adapters(), encoder, None)[0]
    unet = network()
    adapters = Adapters(unet, places)
    assert adapters.names == ("sepia", "keys")
    together = pictures(unet, adapters, encoder, None, "sepia", "keys", "sepia", None)
    assert np.array_equal(together[0], plain), "without an adapter, the bits of a network that never had one"
    assert np.array_equal(together[4], plain)
    assert np.array_equal(together[1], together[3])
    for name, found in (("sepia", together[1]), ("keys", together[2])):
        assert np.array_equal(pictures(unet, adapters, encoder, name)[0], found), "alone as in company"
        merged = network()
        merge_adapter(merged, adapter_path(name, str(places[name])), 1.0)
        expected = pictures(merged, Adapters(), encoder, None)[0]
        assert np.abs(expected.astype(int) - found.astype(int)).max() <= 1
        assert not np.array_equal(found, plain)
    assert not np.array_equal(together[1], together[2])


def test_an_adapter_that_is_not_here_is_refused_with_those_that_are(places: dict[str, Path], encoder: Any) -> None:
    unet = network()
    with pytest.raises(RequestError) as caught:
        pictures(unet, Adapters(unet, places), encoder, "cubism")
    assert caught.value.param == "adapter"
    assert "There is no such adapter." in str(caught.value)
    assert "options: sepia, keys" in str(caught.value)
    with pytest.raises(RequestError, match="leave it out: this server has none"):
        pictures(network(), Adapters(), encoder, "cubism")


def test_an_adapter_that_cannot_be_served_is_named(places: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ServeError, match=r"The adapter gone cannot be served.*cannot be found") as caught:
        Adapters(network(), {"gone": tmp_path / "gone"})
    assert str(tmp_path / "gone") in str(caught.value)
    save_file({"unet.elsewhere.lora_A.weight": torch.zeros(2, 4)}, tmp_path / FILE)
    with pytest.raises(ServeError, match="is of another network"):
        Adapters(network(), {"strange": tmp_path})


@pytest.mark.parametrize("name", ["", "../x", "a b", "a.b", "x" * 65])
def test_a_name_that_could_not_be_asked_for_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="adapters"):
        ServeConfig(model="emoji", adapters={name: "somewhere"})
