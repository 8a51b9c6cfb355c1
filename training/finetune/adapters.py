"""LoRA and DoRA: weights beside a frozen network's, by peft."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from training.finetune.start_config import AdapterConfig

FILE = "pytorch_lora_weights.safetensors"
"""What diffusers looks for in a directory."""

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_JOINT = (*_ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_TARGETS = {"SD3Transformer2DModel": _JOINT, "FluxTransformer2DModel": _JOINT}
"""Layers that get an adapter where the recipe names none: the attentions' projections."""


def default_targets(network_class: str) -> tuple[str, ...]:
    """Ends of the names of the layers that get an adapter where the recipe names none."""
    return _TARGETS.get(network_class, _ATTENTION)


def add_adapter(network: Any, config: AdapterConfig) -> Any:
    """Freeze a network and put a fresh adapter beside its layers; it changes nothing yet.

    Args:
        network: a diffusers model.
        config: the recipe's section.

    Returns:
        ``network``, whose adapter alone requires gradients.

    Raises:
        ConfigError: no layer has such a name, or the adapter to go on from is another.
    """
    from peft import LoraConfig, inject_adapter_in_model

    network.requires_grad_(False)
    targets = config.targets or default_targets(type(network).__name__)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.scale,  # type: ignore[arg-type]  # it is divided by the rank
        target_modules=list(targets),
        use_dora=config.kind == "dora",
        init_lora_weights=True,
    )
    try:
        inject_adapter_in_model(lora, network, adapter_name=config.name)
    except ValueError as error:
        ends = sorted({name.rsplit(".", 1)[-1] for name, each in network.named_modules() if _takes(each)})
        raise ConfigError(
            "The adapter finds no layer.",
            value=list(targets),
            rule="adapter.targets are the ends of the names of linear or convolution layers",
            options=[name for name in ends if not name.isdigit()][:20],
        ) from error
    if config.resume and not next(network.parameters()).is_meta:
        resume_adapter(network, Path(config.resume), config.name)
    return network


def adapter_state(network: Any, name: str | None = None) -> dict[str, torch.Tensor]:
    """An adapter's weights by peft's names, on the CPU; the first one's where no name is given.

    Raises:
        StopIteration: the network has none.
    """
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(network, adapter_name=name or next(iter(network.peft_config)))
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


def resume_adapter(network: Any, path: Path, name: str) -> None:
    """Put the weights of a kept adapter into the network's fresh one.

    Raises:
        ConfigError: it is not there, or of another kind, rank or targets.
    """
    from peft import set_peft_model_state_dict

    kept, fresh = read_adapter(path), adapter_state(network, name)
    wrong = sorted(set(kept) ^ set(fresh)) or [key for key in fresh if kept[key].shape != fresh[key].shape]
    if wrong:
        raise ConfigError(
            "The adapter to go on from is another than the recipe's.",
            value=str(path),
            rule=f"the same kind, rank and targets; {wrong[0]} differs",
        )
    set_peft_model_state_dict(network, kept, adapter_name=name)


def merge_adapter(network: Any, path: Path, weight: float) -> None:
    """Add a kept adapter to the network's own weights.

    Args:
        network: a diffusers model without adapters.
        path: of the adapter, in diffusers' format.
        weight: how much of it.

    Raises:
        ConfigError: it is not there, or of another network.
    """
    inject_kept(network, path, "kept")
    merge(network, weight)


def inject_kept(network: Any, path: Path, name: str) -> None:
    """Put a kept adapter beside a network's weights, and beside the adapters that it has.

    Args:
        network: a diffusers model.
        path: of the adapter, in diffusers' format.
        name: that the adapter gets.

    Raises:
        ConfigError: it is not there, or of another network.
    """
    from peft import LoraConfig, inject_adapter_in_model

    state = read_adapter(path)
    told = _metadata(adapter_file(path))
    ranks = {key.removesuffix(".lora_A.weight"): value.shape[0] for key, value in state.items() if "lora_A" in key}
    layers = dict(network.named_modules())
    strange = sorted(set(ranks) - set(layers))
    if strange or not ranks:
        raise ConfigError(
            "The adapter is of another network.",
            value=str(path),
            rule=f"layers of {type(network).__name__}" + (f", which has no {strange[0]}" if strange else ""),
        )
    rank = max(ranks.values())
    alphas = told.get("alpha_pattern", {}) if told else {f"^{layer}$": value for layer, value in ranks.items()}
    lora = LoraConfig(
        r=rank,
        lora_alpha=told.get("lora_alpha", rank),
        rank_pattern={f"^{layer}$": value for layer, value in ranks.items()},
        alpha_pattern=alphas,
        use_rslora=bool(told.get("use_rslora", False)),
        target_modules="|".join(map(re.escape, ranks)),  # a list would be the ends of names, of other layers too
        use_dora=any("lora_magnitude_vector" in key for key in state),
    )
    inject_adapter_in_model(lora, network, adapter_name=name)
    resume_adapter(network, path, name)


def merge(network: Any, weight: float = 1.0) -> Any:
    """Add a network's adapter to its weights, and take the adapter away.

    Args:
        network: a diffusers model with one adapter.
        weight: how much of it.

    Returns:
        ``network``, a plain diffusers model again.
    """
    from diffusers.utils.peft_utils import recurse_remove_peft_layers
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in network.modules():
        if isinstance(module, LoraLayer) and isinstance(module, BaseTunerLayer):
            module.scale_layer(weight)
            module.merge()
    recurse_remove_peft_layers(network)
    del network.peft_config
    return network


def adapter_file(path: Path) -> Path:
    """The file of an adapter.

    Raises:
        ConfigError: there is none.
    """
    found = path / FILE if path.is_dir() else path
    if found.suffix != ".safetensors" or not found.is_file():
        raise ConfigError(
            "The adapter cannot be found.", value=str(path), rule=f"a .safetensors file, or a directory with {FILE}"
        )
    return found


def read_adapter(path: Path) -> dict[str, torch.Tensor]:
    """An adapter's weights by peft's names, without the pipeline's prefix.

    Raises:
        ConfigError: there is none, it cannot be read, or it is not in diffusers' format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = adapter_file(path)
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ConfigError("The adapter cannot be read.", value=str(file), rule=str(error)) from error
    network = {
        key.split(".", 1)[1]: value for key, value in state.items() if key.split(".", 1)[0] in ("unet", "transformer")
    }
    if len(network) != len(state) or not all(".lora_" in key for key in network):
        others = sorted(key for key in state if not key.startswith(("unet.", "transformer.")))
        raise ConfigError(
            "The adapter is not one of a network alone in diffusers' format.",
            value=others[0] if others else str(file),
            rule="names such as unet.*.lora_A.weight or transformer.*.lora_A.weight",
            mend="load it with diffusers and save it with save_lora_weights",
        )
    return network


def _metadata(file: Path) -> dict[str, Any]:
    """Peft's config of an adapter's network, which diffusers keeps beside the weights; {} where there is none."""
    import json

    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        told = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    return {key.split(".", 1)[1]: value for key, value in told.items()}


def _takes(module: Any) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear | nn.Conv2d)
