"""DeepSpeed's engine: of the core, this file and ``parallel_collectives`` import it.

The engine's state leaves and enters as fp32 parts of tensors by name, so a checkpoint of one ZeRO stage and world
size resumes at any other, and nothing is pickled.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# read once, when deepspeed is imported; chosen here, it does not try out every accelerator that it knows
os.environ["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR") or ("cuda" if torch.cuda.is_available() else "cpu")

import deepspeed

from training.engine_config import EngineConfig
from training.engine_disk import Disk
from training.engine_state import Part, StateSource, gather
from training.errors import TrainingError
from training.loss_scale import LossScale
from training.optim import OptimizerConfig
from training.parallel_collectives import collectives_on, time_collectives
from training.parallel_options import deepspeed_options, prepare
from training.parallel_state import State
from training.precision import Precision, Resolved, resolve
from training.stopwatch import Stopwatch

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


def common_precision(wished: Precision) -> Resolved:
    """The same on every rank: with ``auto``, bf16 only where all of them have it. Every rank calls it."""
    if wished != "auto":
        return wished
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
        lr_scales: factors of the learning rate by the weight's name; 1 where a name is missing.

    Attributes:
        precision: what matrix products are computed in.
        stage: of ZeRO, as it is run.
        micro_batch: rows of one forward on one worker.
        accumulation: forwards of one step; ``micro_batch`` times this is the largest share of a worker, or more.
        average_into: fills tensors like ``weights`` with the average that the optimizer makes itself; None where it
            makes none.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        optimizer: OptimizerConfig,
        config: EngineConfig,
        global_batch: int,
        lr_scales: Mapping[str, float] | None = None,
    ) -> None:
        world = dist.get_world_size()
        self.config = config
        self.precision = common_precision(config.precision)
        share = math.ceil(global_batch / world)
        self.micro_batch = min(config.micro_batch or share, share)
        self.accumulation = math.ceil(share / self.micro_batch)
        self.stage = config.stage_of(world)
        prepare(module, config, self.precision)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer.build(_trained(module), lr_scales or {}),
            dist_init_required=False,
            config=deepspeed_options(config, self.stage, world, self.micro_batch, self.accumulation),
        )
        self.peak_learning_rate = optimizer.learning_rate
        self.names = dict(_trained(self.engine.module))
        self.device = self.engine.device
        disk = Disk(Path(config.offload_path)) if config.offload == "nvme" and config.offload_path else None
        self.state = State(self.stage, self.optimizer, self.names, optimizer.fresh, disk)
        self._weights = [part for part in self.state.parts if part.group == "weights"]
        self._scale = LossScale() if self.precision == "fp16" else None
        self._muon: Any = None
        self._muon_updates = 0
        if optimizer.kind == "muon":
            self._muon = self.state.torch_optimizer
            self._muon.bind(self.state.pieces, self.state.groups)
            self._matrices = sum(optimizer.takes(name, weight) for name, weight in self.names.items())
        self.average_into = self._schedule_free(optimizer.beta1) if optimizer.kind == "schedule_free" else None
        if world > 1:
            time_collectives()
        else:
            self.engine.enable_backward_allreduce = False  # it would copy every gradient to and fro
        if self.stage == 0:
            self.engine.zero_grad = self._forget_gradients  # DeepSpeed's walks through the whole module

    def step(
        self, micro_batches: Iterator[Sequence[Any]], learning_rate: float, clock: Stopwatch
    ) -> tuple[torch.Tensor, float]:
        """One optimizer step.

        A gradient that is not finite changes nothing in fp16 and under ZeRO.

        Args:
            micro_batches: arguments of the module's ``forward``, ``accumulation`` times.
            learning_rate: the rate of this step.
            clock: times its parts.

        Returns:
            This rank's mean loss ``[]`` and the gradient's norm before clipping. A step in which fp16's loss scale
            was found to be too large has the norm 0.

        Raises:
            TrainingError: Muon has left out a matrix.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        if self._scale and self.stage:
            self.optimizer.override_loss_scale(self._scale.value)
        losses: list[torch.Tensor] = []
        norm = 0.0
        with collectives_on(clock):
            for arguments in micro_batches:
                with clock("forward"):
                    loss = self.engine(*arguments)
                with clock("backward"):
                    self.engine.backward(loss * self._scale.value if self._scale and not self.stage else loss)
                losses.append(loss.detach())
                with clock("optimizer"):
                    norm = self._update(last=len(losses) == self.accumulation)
        return (losses[0] if len(losses) == 1 else torch.stack(losses).mean()), norm

    def _update(self, *, last: bool) -> float:
        """Count a micro-batch; after the last, move the weights. Returns the gradient's norm, then."""
        if not last:
            self.engine.step()
            return 0.0
        before = self._muon.orthogonalised if self._muon else 0
        norm = self._step_whole() if self.stage == 0 else self._step_sharded()
        moved = math.isfinite(norm)
        if self._scale and self._scale.update(overflow=not moved):
            return 0.0
        if self._muon and moved and self._muon.orthogonalised - before != self._muon.matrices:
            raise TrainingError(
                "Muon has left out a matrix.",
                value=self._muon.orthogonalised - before,
                rule=f"all {self._muon.matrices} of this rank in every step",
            )
        if self._muon and moved:
            self._muon_updates += self._matrices
        return norm

    def _step_whole(self) -> float:
        """Without ZeRO, DeepSpeed knows nothing of a loss scale, and keeps the norm to itself."""
        weights = list(self.names.values())
        if self._scale:
            torch._foreach_mul_([weight.grad for weight in weights if weight.grad is not None], 1 / self._scale.value)
        norm = torch.nn.utils.clip_grad_norm_(weights, self.config.gradient_clip or math.inf)
        if self._scale and not bool(norm.isfinite()):
            self._forget_gradients()
        self.engine.step()
        return float(norm)

    def _forget_gradients(self) -> None:
        for weight in self.names.values():
            weight.grad = None

    def _step_sharded(self) -> float:
        self.engine.step()
        return math.inf if self.optimizer.overflow else float(self.engine.get_global_grad_norm())

    def _schedule_free(self, beta1: float) -> Callable[[list[torch.Tensor]], None]:
        """What gives the average that the optimizer makes itself (Defazio et al. 2024, ``x`` from ``y`` and ``z``)."""
        live = [part.values for part in self._weights]
        ahead = [part.values for part in self.state.parts if part.group == "optimizer.z"]

        def average_into(tensors: list[torch.Tensor]) -> None:
            torch._foreach_copy_(tensors, live)
            torch._foreach_lerp_(tensors, ahead, 1 - 1 / beta1)

        return average_into

    def metrics(self) -> dict[str, float]:
        """What a chart of the run should show of the engine."""
        told: dict[str, float] = {}
        if self._scale:
            told |= {"loss_scale": self._scale.value, "loss_scale_overflows": self._scale.overflows}
        if self._muon:
            told["muon_updates"] = self._muon_updates
        return told

    @property
    def weights(self) -> list[Part]:
        """This rank's parts of the fp32 weights: views, and the same list each time."""
        return self._weights

    def parts(self) -> list[Part]:
        """This rank's parts of the weights and of the optimizer's state; over the ranks every element once.

        They are views, and the same list each time.
        """
        return self.state.parts

    def scalars(self) -> dict[str, float]:
        """What the optimizer and the loss scale count; the same on every rank."""
        return self.state.scalars() | (self._scale.scalars() if self._scale else {})

    def take(self, source: StateSource) -> None:
        """Take a state of any stage and world size. Every rank must call.

        Raises:
            CheckpointError: the names or shapes are another network's.
        """
        self.state.take(source)
        if self._scale:
            self._scale.take(source.scalars)

    def whole(self, group: str) -> dict[str, torch.Tensor]:
        """The whole fp32 tensors of a group by name, on every rank's CPU. Every rank must call."""
        parts = [part for part in self.parts() if part.group == group]
        return {name: tensor.cpu() for name, tensor in gather(parts, self.device).items()}


def _trained(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, weight) for name, weight in module.named_parameters() if weight.requires_grad)


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
