"""The network of a pipeline, loaded, with an adapter where the recipe trains one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import ConfigError
from training.finetune.adapters import add_adapter, merge_adapter
from training.finetune.files import load_part
from training.finetune.inversion_config import InversionConfig
from training.finetune.layout import Pipeline
from training.finetune.start_config import AdapterConfig
from training.finetune.tokens import shape_of
from training.models.pretrained import PretrainedConfig

if TYPE_CHECKING:
    from training.conditioning import ConditioningShape
    from training.config import TrainConfig


def starting_network(config: TrainConfig, told: ConditioningShape, channels: int, factor: int) -> Any:
    """What a run trains: fresh weights, or a pipeline's with its adapters; only what is trained requires gradients.

    Fresh weights, an adapter's included, are drawn from torch's global generator. Under ``torch.device("meta")`` or
    fake tensors no weights are read.

    Args:
        config: the recipe.
        told: what the network is told about each picture.
        channels: of what it sees.
        factor: pixels of a picture's side for one value of what it sees.

    Raises:
        ConfigError: the weights or an adapter's do not load.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

    # empty: a layer's fresh weights would be drawn from the same numbers as the network's
    if config.start is None or not isinstance(torch.empty(1), FakeTensor):
        return _started(config, told, channels, factor)
    with unset_fake_temporarily(), torch.device("meta"):  # peft moves weights, which fake ones do not bear
        network = _started(config, told, channels, factor)
    for module in network.modules():
        for name, value in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.empty(value.shape), requires_grad=value.requires_grad))
        for name, value in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(value.shape, dtype=value.dtype))
    return network


def _started(config: TrainConfig, told: ConditioningShape, channels: int, factor: int) -> Any:
    adapter = config.adapter
    if isinstance(adapter, InversionConfig) and isinstance(config.model, PretrainedConfig):
        from training.finetune.inversion import invert

        pipeline = Pipeline.read(Path(config.model.pipeline))
        told = shape_of(pipeline, told.tokens)  # of the states, which it makes of the numbers that it is told
        return invert(_merged(config, told, channels, factor), pipeline, adapter)
    network = _merged(config, told, channels, factor)
    return add_adapter(network, adapter) if isinstance(adapter, AdapterConfig) else network


def _merged(config: TrainConfig, told: ConditioningShape, channels: int, factor: int) -> Any:
    network = config.model.build(told, channels, factor)
    if config.start is not None and not next(network.parameters()).is_meta:
        for each in config.start.adapters:
            merge_adapter(network, Path(each.path), each.weight)
    return network


def load_network(directory: Path, told: ConditioningShape, channels: int) -> Any:
    """The network of a pipeline directory, in float32 and in training mode.

    Under ``torch.device("meta")`` no weights are read.

    Raises:
        ConfigError: the weights do not load, or the network is of other latents or captions.
    """
    import torch

    from training.models import network_class

    pipeline = Pipeline.read(directory)
    _require_fitting(pipeline, told, channels)
    kind = network_class(pipeline.layout.network[1])
    folder = pipeline.network_at
    if torch.empty(1).is_meta:
        return kind.from_config(kind.load_config(folder))
    return load_part(kind, folder, "The pipeline's network", torch_dtype=torch.float32).train()


def _require_fitting(pipeline: Pipeline, told: ConditioningShape, channels: int) -> None:
    sees = pipeline.network["in_channels"] // (4 if pipeline.kind == "flux" else 1)
    if sees != channels:
        raise ConfigError(
            "The network does not see this autoencoder's latents.",
            value=f"{channels} channels",
            rule=f"{sees}, by {pipeline.network_at / 'config.json'}",
            mend="leave latents.autoencoder out: the pipeline's own is then taken",
        )
    own = shape_of(pipeline, told.tokens)
    if (own.width, own.pooled) != (told.width, told.pooled):
        raise ConfigError(
            "The network is not told by these encoders.",
            value=f"width {told.width}, pooled {told.pooled}",
            rule=f"width {own.width}, pooled {own.pooled}, by {pipeline.network_at / 'config.json'}",
            mend="leave the conditioning section out: the pipeline's own encoders are then taken",
        )
