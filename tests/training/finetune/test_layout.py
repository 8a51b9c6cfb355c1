"""Pipelines that cannot be trained are refused by name, before anything is loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training.config import load_recipe, parse
from training.errors import ConfigError
from training.finetune.layout import Pipeline
from training.finetune.network import load_network
from training.finetune.objective import objective_of
from training.finetune.output import write_pipeline
from training.finetune.tokens import shape_of


@pytest.fixture
def copied(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a tiny pipeline, to break."""
    return lambda layout: Path(shutil.copytree(tiny(layout), tmp_path / layout))


def recipe(pipeline: object, **sections: Any) -> Any:
    return parse({"data": {"path": "/data"}, "start": {"pipeline": str(pipeline)}, **sections})


def edited(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("layout", ["sd", "pixart"])
def test_the_packaged_recipe_is_valid_with_a_pipeline(tiny: Callable[[str], Path], layout: str) -> None:
    config = load_recipe("finetune", [f"start.pipeline={tiny(layout)}", "adapter.kind=lora"])
    assert parse(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer_2", "scheduler"])
def test_a_missing_part_is_named(copied: Callable[[str], Path], part: str) -> None:
    pipeline = copied("sdxl")
    shutil.rmtree(pipeline / part)
    with pytest.raises(ConfigError, match=rf"The pipeline's part {part} is not whole.") as caught:
        recipe(pipeline)
    assert "fetch the pipeline again" in str(caught.value)


def test_pickled_weights_are_named_and_not_read(copied: Callable[[str], Path]) -> None:
    pipeline = copied("sd")
    weights = next((pipeline / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ConfigError, match=r"(?s)part unet has pickled weights only.*\.bin.*save_pretrained"):
        recipe(pipeline)


def test_a_lost_shard_of_weights_is_named(copied: Callable[[str], Path]) -> None:
    pipeline = copied("flux")
    listing = pipeline / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    listing.write_text(json.dumps({"weight_map": {"a": "diffusion_pytorch_model-00002-of-00002.safetensors"}}))
    with pytest.raises(ConfigError, match=r"00002-of-00002\.safetensors, named in"):
        recipe(pipeline)


def test_code_of_a_pipelines_own_is_not_run(copied: Callable[[str], Path], tmp_path: Path) -> None:
    pipeline, ran = copied("sd"), tmp_path / "ran"
    (pipeline / "unet" / "mine.py").write_text(f"open({str(ran)!r}, 'w')\nclass Network: ...\n")
    edited(pipeline / "model_index.json", unet=["mine", "Network"])
    with pytest.raises(ConfigError, match=r"(?s)part unet is none that is loaded.*mine\.Network.*is not run"):
        recipe(pipeline)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["../secret", "/etc", "vae/../..", ""])
def test_a_part_that_lies_outside_the_pipeline_is_refused(copied: Callable[[str], Path], name: str) -> None:
    pipeline = copied("sd")
    edited(pipeline / "model_index.json", **{name: ["diffusers", "AutoencoderKL"]})
    with pytest.raises(ConfigError, match=r"(?s)names a part by no name.*the name of a folder in the pipeline"):
        recipe(pipeline)


def test_a_class_of_another_layout_is_refused_with_those_that_fit(copied: Callable[[str], Path]) -> None:
    pipeline = copied("sd")
    edited(pipeline / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    with pytest.raises(ConfigError, match=r"(?s)part vae.*AutoencoderTiny.*options: AutoencoderKL"):
        recipe(pipeline)


def test_a_pipeline_of_no_known_layout_is_refused_with_those_that_are(copied: Callable[[str], Path]) -> None:
    pipeline = copied("sd")
    edited(pipeline / "model_index.json", _class_name="KandinskyPipeline")
    with pytest.raises(ConfigError, match=r"(?s)KandinskyPipeline.*StableDiffusionXLPipeline.*FluxPipeline"):
        recipe(pipeline)


def test_a_directory_without_a_pipeline_names_those_below_it(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"(?s)no diffusers pipeline.*options: .*sd") as caught:
        recipe(tiny("sd").parent)
    assert str(tiny("sd")) in str(caught.value)


def test_a_place_that_is_neither_directory_nor_hub_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)cannot be found.*org/name@revision"):
        recipe(tmp_path / "nothing")


def test_a_hub_without_network_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"(?s)hub does not give.*somebody/pipeline@main.*start.pipeline=DIR"):
        recipe("somebody/pipeline@main")


def test_a_recipe_that_describes_a_network_beside_a_pipeline_is_refused(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"(?s)describes no network.*model\.widths.*model\.resolution alone"):
        recipe(tiny("sd"), model={"widths": [8, 16]})


def test_other_conditioning_beside_a_pipeline_is_refused(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"(?s)pipeline's own encoders.*conditioning.kind: class"):
        recipe(tiny("sd"), conditioning={"kind": "class"})


def test_an_adapter_without_a_pipeline_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"start\.pipeline=DIR"):
        parse({"data": {"path": "/data"}, "adapter": {"rank": 4}})


def test_a_recipe_is_filled_in_without_torch_and_read_again_without_the_pipeline(copied: Callable[[str], Path]) -> None:
    pipeline = copied("sd3")
    code = (
        "import sys, json; from training.config import parse\n"
        f"config = parse({{'data': {{'path': '/d'}}, 'start': {{'pipeline': {str(pipeline)!r}}}}})\n"
        "assert 'torch' not in sys.modules\n"
        "print(config.model_dump_json())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    shutil.rmtree(pipeline)
    config = parse(json.loads(told))
    assert config.model.resolution == 32
    assert config.latents is not None
    assert config.latents.autoencoder == str(pipeline / "vae")
    assert config.conditioning.model_dump()["max_tokens"] == 256
    assert config.objective.model_dump()["time_shift"] == 3.0


def test_what_the_recipe_says_of_the_objective_stands(tiny: Callable[[str], Path]) -> None:
    config = recipe(tiny("sd"), objective={"caption_dropout": 0.2, "min_snr_gamma": 5.0})
    told = config.objective.model_dump()
    assert (told["kind"], told["caption_dropout"], told["min_snr_gamma"]) == ("epsilon", 0.2, 5.0)
    assert told["noise_schedule"]["beta_start"] == 0.00085
    assert recipe(tiny("sd"), objective={"kind": "v"}).objective.kind == "v"


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({"_class_name": "PNDMScheduler", "beta_schedule": "squaredcos_cap_v2"}, "cosine"),
        ({"_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction"}, "linear"),
    ],
)
def test_betas_are_read_by_diffusers_names(scheduler: dict[str, Any], expected: str) -> None:
    assert objective_of(scheduler, 1)["noise_schedule"]["kind"] == expected


def test_the_shift_of_flux_is_that_of_its_pipeline() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    scheduler.set_timesteps(sigmas=[0.5], mu=calculate_shift(1024))
    shift = objective_of({"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler.config}, 1024)["time_shift"]
    assert shift * 0.5 / (1 + (shift - 1) * 0.5) == pytest.approx(float(scheduler.sigmas[0]))


@pytest.mark.parametrize(
    ("told", "rule"),
    [
        ({"prediction_type": "sample"}, "prediction_type is one of"),
        ({"num_train_timesteps": 100}, "num_train_timesteps is one of"),
        ({"trained_betas": [0.1]}, "trained_betas is one of"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is one of"),
    ],
)
def test_a_scheduler_of_no_objective_of_ours_is_refused(told: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        objective_of({"_class_name": "DDPMScheduler", **told}, 1)


@pytest.mark.parametrize(
    ("section", "told"),
    [("model", {"family": "pretrained", "resolution": 32}), ("conditioning", {"kind": "pipeline", "max_tokens": 77})],
)
def test_parts_of_a_pipeline_that_no_run_starts_from_are_refused(
    tiny: Callable[[str], Path], section: str, told: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=rf"(?s){section}\..* is what a pipeline decides.*start\.pipeline=DIR"):
        parse({"data": {"path": "/data"}, section: {**told, "pipeline": str(tiny("sd"))}})


def test_an_objective_that_a_recipe_states_stands_and_is_what_the_output_is_sampled_by(
    copied: Callable[[str], Path], tmp_path: Path
) -> None:
    pipeline = copied("sd")
    edited(pipeline / "scheduler" / "scheduler_config.json", beta_schedule="sigmoid")
    with pytest.raises(ConfigError, match="state the objective section"):
        recipe(pipeline)
    config = recipe(pipeline, objective={"kind": "v"})
    read = Pipeline.read(pipeline)
    network = load_network(pipeline, shape_of(read, 77), 4)
    write_pipeline(tmp_path / "out", network, read, config.objective)
    assert objective_of(Pipeline.read(tmp_path / "out").config("scheduler"), 1)["kind"] == "v"


def test_every_tiny_pipeline_is_whole(tiny: Callable[[str], Path]) -> None:
    kinds = {layout: Pipeline.read(tiny(layout)).kind for layout in ("sd", "sdxl", "sd3", "flux", "pixart", "sana")}
    assert all(layout == kind for layout, kind in kinds.items())
