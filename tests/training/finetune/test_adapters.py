"""Adapters: what is trained, and what others load of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from training import models
from training.conditioning import Conditioning, ConditioningShape
from training.config import TrainConfig, parse
from training.errors import ConfigError
from training.finetune.adapters import FILE, adapter_state
from training.finetune.layout import Pipeline
from training.finetune.network import starting_network
from training.finetune.output import COMFYUI, write_adapter, write_pipeline
from training.finetune.tokens import shape_of
from training.models.trained import trained_names

RANK, ALPHA = 3, 6.0
CASES = [("sd", "lora"), ("sdxl", "lora"), ("sd3", "dora"), ("flux", "lora"), ("pixart", "lora"), ("sana", "lora")]
MORE = [("sd", "dora"), ("sd3", "lora"), ("sana", "dora")]
FEW = ("sd", "sd3", "flux")
"""Layouts that stand for the others where every layout takes the same way."""


def cases(*layouts: str, without: str = "") -> list[Any]:
    """Every layout and kind; other layouts than these, and further kinds, in a slow run."""
    wanted = [case for case in [*CASES, *MORE] if case[0] != without]
    now = [case for case in wanted if case in CASES and case[0] in layouts]
    return now + [pytest.param(*case, marks=pytest.mark.slow) for case in wanted if case not in now]


def recipe(pipeline: Path, **sections: Any) -> TrainConfig:
    values = {"data": {"path": "/data"}, "start": {"pipeline": str(pipeline)}, "model": {"resolution": 32}}
    return parse({**values, **sections})


def adapted(pipeline: Path, kind: str = "lora", **options: Any) -> Any:
    """A pipeline's network with an adapter that changes something."""
    torch.manual_seed(0)
    adapter = {"kind": kind, "rank": RANK, "alpha": ALPHA, **options}
    network = network_of(recipe(pipeline, adapter=adapter)).eval()
    for name, weight in network.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.3)
    return network


def shape(pipeline: Path) -> ConditioningShape:
    return shape_of(Pipeline.read(pipeline), 24)


def network_of(config: TrainConfig) -> Any:
    assert config.start is not None
    return starting_network(config, shape(Path(config.start.pipeline)), 4, 8)


@torch.no_grad()
def answer(network: Any, told: ConditioningShape) -> torch.Tensor:
    """Of a network, to fixed inputs."""
    draw = torch.Generator().manual_seed(0)
    pooled = torch.randn(2, told.pooled, generator=draw) if told.pooled else None
    tokens = torch.randn(2, told.tokens, told.width, generator=draw)
    conditioning = Conditioning(tokens, torch.ones(2, told.tokens, dtype=torch.bool), pooled)
    return models.apply(network.eval(), torch.randn(2, 4, 4, 4, generator=draw), torch.tensor([0.3, 0.9]), conditioning)


def network_in(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


@pytest.mark.parametrize(("layout", "kind"), cases(*FEW))
def test_only_the_adapter_is_trained_and_it_changes_nothing_at_first(
    tiny: Callable[[str], Path], layout: str, kind: str
) -> None:
    plain = network_of(recipe(tiny(layout)))
    fresh = network_of(recipe(tiny(layout), adapter={"kind": kind, "rank": RANK}))
    assert all(".lora_" in name for name in trained_names(fresh))
    assert trained_names(plain) == {name for name, _ in plain.named_parameters()}
    torch.testing.assert_close(
        answer(fresh, shape(tiny(layout))), answer(plain, shape(tiny(layout))), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("layout", "kind"), cases(*FEW, without="pixart"))
def test_diffusers_loads_the_adapter(tiny: Callable[[str], Path], tmp_path: Path, layout: str, kind: str) -> None:
    import diffusers

    network, told = adapted(tiny(layout), kind), shape(tiny(layout))
    write_adapter(tmp_path, network, Pipeline.read(tiny(layout)))
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny(layout), local_files_only=True)
    before = answer(network_in(pipe), told)
    pipe.load_lora_weights(tmp_path, weight_name=FILE)
    after = answer(network_in(pipe), told)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, answer(network, told), rtol=1e-4, atol=1e-5)


def test_peft_loads_the_adapter_of_pixart(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    import diffusers
    from peft import PeftModel

    network, told = adapted(tiny("pixart")), shape(tiny("pixart"))
    write_adapter(tmp_path, network, Pipeline.read(tiny("pixart")))
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny("pixart"), local_files_only=True)
    loaded = PeftModel.from_pretrained(pipe.transformer, tmp_path)
    torch.testing.assert_close(answer(loaded.base_model.model, told), answer(network, told), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("layout", "kind"), cases(*(layout for layout, _ in CASES)))
def test_the_pipeline_that_is_written_has_the_adapter_merged_and_makes_pictures(
    tiny: Callable[[str], Path], tmp_path: Path, layout: str, kind: str
) -> None:
    import diffusers

    network, told = adapted(tiny(layout), kind), shape(tiny(layout))
    write_pipeline(tmp_path / "out", network, Pipeline.read(tiny(layout)), recipe(tiny(layout)).objective)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    torch.testing.assert_close(answer(network_in(pipe), told), answer(network, told), rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name in network_in(pipe).state_dict())
    options = {"use_resolution_binning": False} if layout in ("pixart", "sana") else {}
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a cat", num_inference_steps=1, height=32, width=32, **options).images[0]
    assert picture.size == (32, 32)
    assert adapter_state(network)  # the run goes on with its adapter


@pytest.mark.parametrize("layout", ["sd", "sdxl"])
def test_comfyui_finds_a_unets_layers_by_kohyas_names(tiny: Callable[[str], Path], tmp_path: Path, layout: str) -> None:
    network = adapted(tiny(layout), "dora")
    write_adapter(tmp_path, network, Pipeline.read(tiny(layout)))
    kept = load_file(tmp_path / COMFYUI)
    layers = {f"lora_unet_{name.replace('.', '_')}": module for name, module in network.named_modules()}
    for key, value in kept.items():
        layer, _, what = key.partition(".")
        weight = layers[layer].base_layer.weight
        if what == "alpha":
            assert value.item() == ALPHA
        elif what == "dora_scale":
            assert value.shape == (weight.shape[0], 1)
        else:
            assert (
                value.shape
                == {"lora_up.weight": (weight.shape[0], RANK), "lora_down.weight": (RANK, weight.shape[1])}[what]
            )
    assert len(kept) == 4 * len({key.partition(".")[0] for key in kept})


@pytest.mark.parametrize("layout", ["sd3", "flux"])
def test_comfyui_finds_a_transformers_layers_by_diffusers_names(
    tiny: Callable[[str], Path], tmp_path: Path, layout: str
) -> None:
    network = adapted(tiny(layout))
    write_adapter(tmp_path, network, Pipeline.read(tiny(layout)))
    kept = load_file(tmp_path / COMFYUI)
    layers = {f"transformer.{name}" for name, module in network.named_modules() if hasattr(module, "base_layer")}
    assert {re.sub(r"\.(lora_[AB]\.weight|alpha)$", "", key) for key in kept} == layers
    assert all(value.item() == ALPHA for key, value in kept.items() if key.endswith(".alpha"))
    assert sum(key.endswith(".lora_B.weight") for key in kept) == len(layers)


@pytest.mark.parametrize(("layout", "kind"), [("sd", "lora"), ("sd3", "dora")])
def test_a_kept_adapter_is_merged_and_another_trained_over_it(
    tiny: Callable[[str], Path], tmp_path: Path, layout: str, kind: str
) -> None:
    network, told = adapted(tiny(layout), kind), shape(tiny(layout))
    write_adapter(tmp_path, network, Pipeline.read(tiny(layout)))
    start = {"pipeline": str(tiny(layout)), "adapters": [{"path": str(tmp_path)}]}
    over = network_of(recipe(tiny(layout), start=start, adapter={"rank": 2, "name": "style"}))
    torch.testing.assert_close(answer(over, told), answer(network, told), rtol=1e-4, atol=1e-5)
    assert all(".style." in name for name in trained_names(over))
    start["adapters"] = [{"path": str(tmp_path), "weight": 0.0}]
    none = network_of(recipe(tiny(layout), start=start))
    if kind == "lora":
        torch.testing.assert_close(answer(none, told), answer(network_of(recipe(tiny(layout))), told))


def test_an_adapter_goes_on_where_it_was_kept(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    network, told = adapted(tiny("sd")), shape(tiny("sd"))
    write_adapter(tmp_path, network, Pipeline.read(tiny("sd")))
    adapter = {"rank": RANK, "alpha": ALPHA, "resume": str(tmp_path)}
    again = network_of(recipe(tiny("sd"), adapter=adapter))
    assert torch.equal(answer(again, told), answer(network, told))
    with pytest.raises(ConfigError, match=r"the same kind, rank and targets; .* differs"):
        network_of(recipe(tiny("sd"), adapter={**adapter, "rank": 4}))


def test_targets_that_no_layer_has_are_refused_with_those_that_there_are(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"(?s)The adapter finds no layer.*options: .*to_k.*to_q"):
        network_of(recipe(tiny("sd"), adapter={"targets": ["query"]}))


def test_an_adapter_of_another_network_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    write_adapter(tmp_path, adapted(tiny("sd3")), Pipeline.read(tiny("sd3")))
    start = {"pipeline": str(tiny("sd")), "adapters": [{"path": str(tmp_path)}]}
    with pytest.raises(ConfigError, match="layers of UNet2DConditionModel, which has no transformer_blocks"):
        network_of(recipe(tiny("sd"), start=start))
