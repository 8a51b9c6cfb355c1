"""What a recipe's network takes: parameters, FLOPs and activations, found without computing or allocating anything.

The real network is built and run forwards and backwards on fake tensors, which have shapes and no memory.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from training.conditioning import Conditioning, ConditioningShape
from training.config import TrainConfig
from training.data.buckets import buckets_of
from training.finetune.network import starting_network
from training.latents import canvas_of
from training.objectives import Draws
from training.optim import MuonConfig, OptimizerConfig
from training.step import ObjectiveLoss


@dataclass(frozen=True)
class Footprint:
    """What a network takes.

    Attributes:
        parameters: trained and frozen.
        trained: parameters that are trained.
        optimizer: numbers that the optimizer keeps of them.
        flops_per_image: of forward and backward, by ``torch.utils.flop_counter``: products of matrices and
            convolutions, a multiplication and an addition counted as two.
        fixed_bytes: the most that lives at once between the start of the forward and the end of the backward,
            besides the weights and their gradients, however few rows there are.
        row_bytes: and for each row of a micro-batch.
    """

    parameters: int
    trained: int
    optimizer: int
    flops_per_image: int
    fixed_bytes: int
    row_bytes: int

    def activation_bytes(self, rows: int) -> int:
        """The most that lives at once for a micro-batch."""
        return self.fixed_bytes + rows * self.row_bytes


def measure(config: TrainConfig, told: ConditioningShape, precision: str) -> Footprint:
    """Measure a recipe's network under its objective, on the largest of the recipe's shapes.

    Args:
        config: the recipe.
        told: of what the network is told.
        precision: of the matrix products, ``fp32``, ``bf16`` or ``fp16``.

    Raises:
        ConfigError: the autoencoder is not there, or does not suit the network.
    """
    canvas = canvas_of(config)
    shapes = [(each.height, each.width) for each in buckets_of(config.model.resolution, config.data.buckets)]
    height, width = max(shapes, key=lambda shape: shape[0] * shape[1])
    shape = (canvas.channels, height // canvas.factor, width // canvas.factor)
    # meta tensors are twice as fast, and have no autocast
    with torch.device("meta") if precision == "fp32" else FakeTensorMode():
        network = starting_network(config, told, canvas.channels, canvas.factor)
        module = ObjectiveLoss(network, config.objective)
        parameters = list(module.parameters())
        kept = _kept_by(config.optimizer, module)
        flops = FlopCounterMode(display=False)
        with flops:
            least = _passed(module, shape, told, 1, precision)
        able = getattr(network, "_supports_gradient_checkpointing", False)  # the engine refuses where it is not
        if (
            config.engine.gradient_checkpointing and able
        ):  # now, for what is computed again is none of the network's FLOPs
            network.enable_gradient_checkpointing()
            least = _passed(module, shape, told, 1, precision)
        most = _passed(module, shape, told, 2, precision)
    row_bytes = max(0, most - least)  # activations grow evenly with the rows
    return Footprint(
        parameters=sum(each.numel() for each in parameters),
        trained=sum(each.numel() for each in parameters if each.requires_grad),
        optimizer=kept,
        flops_per_image=flops.get_total_flops(),
        fixed_bytes=max(0, least - row_bytes),
        row_bytes=row_bytes,
    )


def _kept_by(optimizer: OptimizerConfig, module: torch.nn.Module) -> int:
    """Numbers of an optimizer's state, the counts of steps aside."""
    found = 0
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            group = {"muon": isinstance(optimizer, MuonConfig) and optimizer.takes(name, weight)}
            state = optimizer.fresh(weight, group)
            found += sum(values.numel() for slot, values in state.items() if slot != "step")
    return found


def _passed(module: ObjectiveLoss, shape: tuple[int, ...], told: ConditioningShape, rows: int, precision: str) -> int:
    """The most bytes that live at once in a forward and a backward over ``rows``, gradients not counted."""
    conditioning = Conditioning(
        torch.zeros(rows, told.tokens, told.width),
        torch.ones(rows, told.tokens, dtype=torch.bool),
        torch.zeros(rows, told.pooled) if told.pooled else None,
    )
    draws = Draws(torch.full((rows,), 0.5), torch.zeros(rows, *shape), torch.ones(rows, dtype=torch.bool))
    clean, weight = torch.zeros(rows, *shape), torch.ones(rows)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.bfloat16)
    live = _Live()
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with live:
        with torch.autocast("cpu", dtype, enabled=precision != "fp32"):
            loss = module(clean, conditioning, draws, weight)
        loss.backward()
    return live.most


class _Live(TorchDispatchMode):
    """Adds up the storages that operations make, while they live.

    Attributes:
        most: the most bytes that lived at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self._now = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        # what an operation writes into or looks at was there before it
        before = {id(each.untyped_storage()) for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor):
                self._take(each.untyped_storage(), before)
        return made

    def _take(self, storage: Any, before: set[int]) -> None:
        if id(storage) in before or storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self._now += size
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self._now -= size
