"""DeepSpeed's engine: the only file of the core that imports it.

The engine's state leaves and enters as whole fp32 tensors by name, so a checkpoint of one ZeRO stage and world
size resumes at any other, and nothing is pickled.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

# read once, when deepspeed is imported; chosen here, it does not try out every accelerator that it knows
os.environ["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR") or ("cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from training.engine_config import EngineConfig
from training.errors import CheckpointError
from training.optim import AdamWConfig
from training.precision import Precision, resolve

MOMENTS = ("exp_avg", "exp_avg_sq")

if os.environ["DS_ACCELERATOR"] == "cpu":
    # It serves inference's all-reduce only and costs a 41 s compilation at the first start. There is none for GPUs,
    # where looking up what is compatible would ask each of them.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for one another: for rank 0 while it waits for its predecessor, for a shard that is encoded."""


def connect(rank: int, local_rank: int, world: int, address: str, port: int) -> None:
    """Join the process group: gloo on a CPU, NCCL on GPUs, one GPU for each process."""
    device = local_device(local_rank)
    # DeepSpeed reads its place from here, and takes LOCAL_RANK for the number of its GPU
    place = {
        "RANK": rank,
        "LOCAL_RANK": device.index or 0,
        "WORLD_SIZE": world,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in place.items()})
    options: dict[str, Any] = {"backend": "gloo"}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options = {"backend": "nccl", "device_id": device}
    url = f"tcp://{address}:{port}"
    dist.init_process_group(init_method=url, rank=rank, world_size=world, timeout=TIMEOUT, **options)


def local_device(local_rank: int) -> torch.device:
    """What a process of this node computes on.

    Ray Train may show every worker its own GPUs only, or all workers all of them.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.device("cuda", local_rank % count) if count else torch.device("cpu")


def common_precision(wished: Precision) -> Literal["bf16", "fp32"]:
    """The same on every rank: with ``auto``, bf16 only where all of them have it. Every rank calls it."""
    here = torch.tensor(float(resolve(wished) == "bf16"), device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(here, dist.ReduceOp.MIN)
    return "bf16" if bool(here) else "fp32"


class Engine:
    """A module trained by DeepSpeed.

    Args:
        module: returns the mean loss of a micro-batch from ``forward``.
        optimizer: how the weights move.
        config: the recipe's engine section.
        global_batch: samples per optimizer step over all workers.

    Attributes:
        precision: what matrix products are computed in.
    """

    def __init__(
        self, module: torch.nn.Module, optimizer: AdamWConfig, config: EngineConfig, global_batch: int
    ) -> None:
        world = dist.get_world_size()
        self.config = config
        self.precision = common_precision(config.precision)
        self.micro_batch = config.micro_batch or global_batch // world
        self.accumulation = global_batch // (world * self.micro_batch)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer.build(module.parameters()),
            dist_init_required=False,
            config=self._deepspeed_config(global_batch),
        )
        self.peak_learning_rate = optimizer.learning_rate
        self.names = dict(self.engine.module.named_parameters())
        self.device = self.engine.device

    def _deepspeed_config(self, global_batch: int) -> dict[str, Any]:
        return {
            "train_batch_size": global_batch,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.config.gradient_clip if self.config.zero_stage else 0.0,
            "communication_data_type": "fp32",
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": self.config.zero_stage},
            "torch_autocast": {
                "enabled": self.precision == "bf16",
                "dtype": "bfloat16",
                # gradients are summed over workers in fp32, whatever the products were computed in
                "lower_precision_safe_modules": [],
            },
            "steps_per_print": 2**31 - 1,
        }

    def step(self, micro_batches: Iterator[Sequence[Any]], learning_rate: float) -> tuple[torch.Tensor, float]:
        """One optimizer step.

        Args:
            micro_batches: arguments of the module's ``forward``, ``accumulation`` times.
            learning_rate: the rate of this step.

        Returns:
            This rank's mean loss ``[]`` and the gradient's norm before clipping.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        total = torch.zeros((), device=self.device)
        norm: Any = None
        for arguments in micro_batches:
            loss = self.engine(*arguments)
            self.engine.backward(loss)
            if self.config.zero_stage == 0 and self.engine.is_gradient_accumulation_boundary():
                # without ZeRO, DeepSpeed clips in fp32 but keeps the norm to itself
                bound = self.config.gradient_clip or math.inf
                norm = torch.nn.utils.clip_grad_norm_(list(self.names.values()), bound)
            self.engine.step()
            total += loss.detach() / self.accumulation
        return total, float(self.engine.get_global_grad_norm() if norm is None else norm)

    def owned(self) -> list[torch.Tensor]:
        """The weights that this rank holds: all of them, or under ZeRO 3 its shards."""
        if self.config.zero_stage == 3:
            return [parameter.ds_tensor for parameter in self.names.values()]
        return [parameter.data for parameter in self.names.values()]

    @contextmanager
    def _whole(self, parameter: Any) -> Iterator[torch.Tensor]:
        if self.config.zero_stage == 3:
            parameter.partition()  # DeepSpeed keeps small weights gathered; gather what the shards hold now
            with deepspeed.zero.GatheredParameters([parameter]):
                yield parameter
        else:
            yield parameter

    def weights(self) -> dict[str, torch.Tensor]:
        """Whole fp32 weights by name, as a forward pass would use them now. Every rank must call."""
        whole = {}
        for name, parameter in self.names.items():
            with self._whole(parameter) as full:
                whole[name] = full.detach().float().cpu().clone().contiguous()
        return whole

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Whole optimizer moments as ``name/moment``, and ``step``. Every rank must call."""
        state = {"step": torch.tensor(float(self._optimizer_steps()))}
        for name, parameter in self.names.items():
            for moment in MOMENTS:
                value = self._moment(parameter, moment)
                state[f"{name}/{moment}"] = value.detach().float().cpu().reshape(parameter_shape(parameter)).clone()
        return state

    def load(self, weights: Mapping[str, torch.Tensor], optimizer_state: Mapping[str, torch.Tensor]) -> None:
        """Take weights and optimizer state of any stage and world size. Every rank must call.

        Raises:
            CheckpointError: the names or shapes are another network's.
        """
        self._check_names(weights)
        self._create_moments(float(optimizer_state["step"]))
        for name, parameter in self.names.items():
            self._set_weight(parameter, weights[name].to(self.device))
            for moment in MOMENTS:
                value = optimizer_state[f"{name}/{moment}"].to(self.device)
                if self.config.zero_stage == 0:
                    self.optimizer.state[parameter][moment].copy_(value)
                elif self.config.zero_stage == 3:
                    safe_set_local_optimizer_state(parameter, _shard(parameter, value), moment)
                else:
                    safe_set_full_optimizer_state(parameter, value, moment)

    def _check_names(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name in sorted(set(self.names) ^ set(weights)):
            raise CheckpointError(
                "The checkpoint belongs to another network.", value=name, rule="the same weight names"
            )
        for name, parameter in self.names.items():
            if tuple(weights[name].shape) != parameter_shape(parameter):
                raise CheckpointError(
                    f"The checkpoint belongs to another network: {name} has another shape.",
                    value=tuple(weights[name].shape),
                    rule=f"{parameter_shape(parameter)}",
                )

    def _set_weight(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        if self.config.zero_stage == 0:
            parameter.data.copy_(value)
            return
        if self.config.zero_stage == 3:
            safe_set_local_fp32_param(parameter, _shard(parameter, value))  # the optimizer's copy
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        else:
            safe_set_full_fp32_param(parameter, value)  # the optimizer's copy
            parameter.data.copy_(value)

    def _moment(self, parameter: torch.Tensor, moment: str) -> torch.Tensor:
        if self.config.zero_stage == 0:
            value: torch.Tensor = self.optimizer.state[parameter][moment]
        else:
            value = safe_get_full_optimizer_state(parameter, moment)
        return value

    def _flat(self) -> tuple[torch.optim.Optimizer, list[torch.Tensor]]:
        """Torch's optimizer and the tensors that it steps."""
        if self.config.zero_stage == 0:
            return self.optimizer, list(self.names.values())
        if self.config.zero_stage == 3:
            return self.optimizer.optimizer, list(self.optimizer.fp32_partitioned_groups_flat)
        return self.optimizer.optimizer, list(self.optimizer.single_partition_of_fp32_groups)

    def _optimizer_steps(self) -> float:
        optimizer, tensors = self._flat()
        return float(optimizer.state[tensors[0]]["step"])

    def _create_moments(self, steps: float) -> None:
        """Torch creates the moments at the first step; a resumed run needs them before.

        Those that exist stay the same tensors: DeepSpeed keeps views of them.
        """
        optimizer, tensors = self._flat()
        for tensor in tensors:
            if optimizer.state[tensor]:
                optimizer.state[tensor]["step"].fill_(steps)
                continue
            optimizer.state[tensor] = {
                "step": torch.tensor(steps, dtype=torch.float32, device=tensor.device),
                **{moment: torch.zeros_like(tensor, requires_grad=False) for moment in MOMENTS},
            }
        if self.config.zero_stage in (1, 2):
            self.optimizer._lazy_init_hp_params_optimizer_state()


def parameter_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The whole shape, also of a weight that ZeRO 3 has sharded."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _shard(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole value under ZeRO 3, the last one padded, which DeepSpeed's own setters forget."""
    size = parameter.ds_tensor.numel()
    padded = torch.nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    return padded.narrow(0, size * dist.get_rank(), size)


def over_ranks(rows: int, mine: Callable[[list[int]], torch.Tensor]) -> torch.Tensor:
    """Share ``rows`` of independent work over the ranks; every rank gets every row's result.

    Args:
        rows: how many.
        mine: computes the results of the given row numbers, ``[len, ...]``.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    chosen = list(range(rank, rows, world))
    part = mine(chosen) if chosen else None
    width: list[Any] = [None] * world
    dist.all_gather_object(width, None if part is None else tuple(part.shape[1:]))
    shape = next(shape for shape in width if shape is not None)
    # a rank without rows takes part with zeros, which NCCL wants on the GPU as well
    whole = torch.zeros((rows, *shape), device="cuda" if torch.cuda.is_available() else "cpu")
    if part is not None:
        whole[chosen] = part.to(whole.dtype)
    dist.all_reduce(whole)
    return whole
