"""What others load of a fine-tuned network: a standard pipeline, and its adapter for diffusers and for ComfyUI.

``pytorch_lora_weights.safetensors`` is diffusers': ``pipe.load_lora_weights(DIR)``, and ``adapter.resume`` of a recipe.
``comfyui.safetensors`` is for ComfyUI's loader of adapters. It looks for a UNet's layers by kohya's names alone,
``lora_unet_<layer with _ for .>.lora_up.weight``, and for a transformer's by diffusers', ``transformer.<layer>``;
in both it reads ``.alpha`` beside them, where a missing one means the rank, and DoRA's ``.dora_scale``. It knows no
network of Sana. PixArt has no loader in diffusers: ``adapter_config.json`` and ``adapter_model.safetensors`` are
peft's, ``PeftModel.from_pretrained(pipe.transformer, DIR)``, which ComfyUI reads as well.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import ConfigError
from training.finetune.adapters import FILE, adapter_state, merge
from training.finetune.files import PICKLED, plain, those_read
from training.finetune.layout import Pipeline
from training.finetune.objective import objective_of

if TYPE_CHECKING:
    import torch

    from training.objectives import Objective

COMFYUI = "comfyui.safetensors"
_KEPT = ("model_index.json", "LICENSE*", "*.md")


def write_pipeline(out: Path, network: Any, pipeline: Pipeline, objective: Objective) -> None:
    """Write the pipeline with another network; an adapter of its is merged into it, and written to ``adapter/`` too.

    Of the other parts the files are copied that are ever read. A part with pickled weights alone, which no run needs,
    is left out of the pipeline.

    Args:
        out: a directory, made if need be.
        network: of the pipeline's class, with an adapter or without.
        pipeline: that the run started from.
        objective: how the network was trained; the pipeline's scheduler stays where it is of the same kind.
    """
    out.mkdir(parents=True, exist_ok=True)
    for pattern in _KEPT:
        for path in pipeline.directory.glob(pattern):
            shutil.copyfile(path, out / path.name)
    part, _ = pipeline.layout.network
    for name, told in pipeline.index.items():
        if isinstance(told, list) and name != part and not _copy_part(pipeline.directory / name, out / name):
            _tell_index(out, name, None, None)
    if not _same_schedule(pipeline, objective):
        _write_scheduler(out, objective)
    if has_adapter(network):
        write_adapter(out / "adapter", network, pipeline)
        network = merge(copy.deepcopy(network))
    twin = type(network).from_config(network.config)  # safetensors takes no weights that lie in other orders
    twin.load_state_dict(network.state_dict())
    twin.save_pretrained(out / part, safe_serialization=True)


def _copy_part(folder: Path, out: Path) -> bool:
    """Copy what is read of a part, weights by their plain names, which diffusers looks for unasked.

    Returns:
        Whether the part is there, and not its pickled weights alone.
    """
    there = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    names = those_read(there)
    weights = [name for name in names if name.endswith(".safetensors")]
    if not names or (not weights and any(name.endswith(PICKLED) for name in there)):
        return False
    out.mkdir()
    for name in names:
        if plain(name) != name and name.endswith(".json"):
            listing = json.loads((folder / name).read_bytes())
            listing["weight_map"] = {key: plain(file) for key, file in listing["weight_map"].items()}
            (out / plain(name)).write_text(json.dumps(listing, indent=2) + "\n")
        else:
            shutil.copyfile(folder / name, out / plain(name))
    return True


def _tell_index(out: Path, part: str, library: str | None, kind: str | None) -> None:
    """Another class of a part."""
    path = out / "model_index.json"
    index = json.loads(path.read_bytes())
    index[part] = [library, kind]
    path.write_text(json.dumps(index, indent=2) + "\n")


def _same_schedule(pipeline: Pipeline, objective: Objective) -> bool:
    """Whether the pipeline's own scheduler still samples the network."""
    try:
        own = objective_of(pipeline.config("scheduler"), 1)
    except ConfigError:  # it says what no objective of ours is; the recipe stated its own
        return False
    if own["kind"] != objective.model_dump()["kind"]:
        return False
    told = type(objective).model_validate(own)
    decisive = ("noise_schedule", "sigma_data")
    return all(getattr(told, name, None) == getattr(objective, name, None) for name in decisive)


def _write_scheduler(out: Path, objective: Objective) -> None:
    scheduler = objective.scheduler()
    shutil.rmtree(out / "scheduler")
    scheduler.save_pretrained(out / "scheduler")
    _tell_index(out, "scheduler", "diffusers", type(scheduler).__name__)


def has_adapter(network: Any) -> bool:
    """Whether an adapter is trained beside the network's weights."""
    return bool(getattr(network, "peft_config", None))


def write_adapter(out: Path, network: Any, pipeline: Pipeline) -> None:
    """Write the adapter of a network for diffusers and ComfyUI.

    Args:
        out: a directory, made if need be.
        network: with an adapter.
        pipeline: that the run started from.
    """
    import diffusers
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    part, _ = pipeline.layout.network
    state = adapter_state(network)
    config = _plain(next(iter(network.peft_config.values())).to_dict())
    writer = getattr(diffusers, pipeline.name)
    if hasattr(writer, "save_lora_weights"):
        writer.save_lora_weights(
            out, **{f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": config}, weight_name=FILE
        )
        if pipeline.kind != "sana":
            save_file(comfyui_state(state, part, float(config["lora_alpha"])), out / COMFYUI)
        return
    save_file({f"base_model.model.{name}": value for name, value in state.items()}, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def comfyui_state(state: dict[str, torch.Tensor], part: str, alpha: float) -> dict[str, torch.Tensor]:
    """An adapter's weights by the names that ComfyUI looks for.

    Args:
        state: by peft's names.
        part: ``unet`` or ``transformer``.
        alpha: of all layers.
    """
    import torch

    kohya = part == "unet"
    names = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
    made = {}
    for key, value in state.items():
        layer, _, what = key.rpartition(".lora_")
        told = f"lora_unet_{layer.replace('.', '_')}" if kohya else f"{part}.{layer}"
        if what.startswith("magnitude_vector"):
            made[f"{told}.dora_scale"] = value.reshape(value.numel(), *[1] * (max(2, value.ndim) - 1))
            continue
        made[f"{told}.{names[what.startswith('B')]}.weight"] = value
        made[f"{told}.alpha"] = torch.tensor(alpha)
    return made


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A config of peft as JSON has it."""
    return {
        name: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for name, value in config.items()
        if not (name in ("runtime_config", "eva_config", "corda_config", "lora_ga_config") or value is None)
    }
