"""Where a rank's share of the weights and of the optimizer's state lies inside DeepSpeed's engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from training import ranks
from training.engine_disk import Disk
from training.engine_state import Part, StateSource, check_shapes, read_into
from training.errors import CheckpointError

Fresh = Callable[[torch.Tensor, Mapping[str, Any]], dict[str, Any]]
"""Gives a tensor's optimizer state before its first step, from the tensor and its parameter group."""
COUNTED = frozenset({"k", "weight_sum", "lr_max", "scheduled_lr"})
"""What schedule-free optimizers count in their groups."""


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of one weight that this rank's optimizer answers for.

    Attributes:
        name: the weight's.
        shape: of the whole weight.
        start: the first element in the flattened weight.
        count: how many.
        stepped: the tensor that the optimizer steps: under ZeRO a flat one with many weights' pieces.
        offset: where the piece begins in it.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    stepped: torch.Tensor
    offset: int

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The piece's elements of a tensor laid out as ``stepped`` is: a view."""
        return values.detach().view(-1)[self.offset : self.offset + self.count]


def shape_of(parameter: torch.Tensor) -> tuple[int, ...]:
    """The whole shape, also of a weight that ZeRO 3 has sharded."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def share_of(sizes: Iterable[int], rank: int, world: int) -> Iterator[tuple[int, int]]:
    """First and last-but-one element of each tensor that a rank answers for, when all of them hold everything.

    The tensors are laid end to end and cut into ``world`` stretches, so that a rank has few pieces.
    """
    sizes = list(sizes)
    first, last = (sum(sizes) * number // world for number in (rank, rank + 1))
    place = 0
    for size in sizes:
        start, stop = (min(max(edge - place, 0), size) for edge in (first, last))
        yield start, stop
        place += size


def pieces(stage: int, optimizer: Any, parameters: Mapping[str, torch.Tensor]) -> list[Piece]:
    """This rank's, over all ranks every element of every weight once.

    Args:
        stage: of ZeRO.
        optimizer: DeepSpeed's, or at stage 0 torch's.
        parameters: the module's by name.
    """
    if stage == 0:
        cuts = share_of((weight.numel() for weight in parameters.values()), dist.get_rank(), dist.get_world_size())
        every = (
            Piece(name, tuple(weight.shape), start, stop - start, weight, start)
            for (name, weight), (start, stop) in zip(parameters.items(), cuts, strict=True)
        )
    elif stage == 3:
        every = (_shard(optimizer, name, weight) for name, weight in parameters.items())
    else:
        every = (
            _fragment(optimizer, name, weight)
            for name, weight in parameters.items()
            if weight._hp_mapping is not None  # type: ignore[attr-defined]
        )
    return [piece for piece in every if piece.count]


def _fragment(optimizer: Any, name: str, weight: Any) -> Piece:
    """ZeRO 1 and 2 lay the weights of a group end to end and cut them into equal partitions."""
    held = weight._hp_mapping
    flat = optimizer.single_partition_of_fp32_groups[held.param_group_index]
    whole, here = held.lp_fragment_address, held.hp_fragment_address
    return Piece(name, tuple(weight.shape), whole.start, whole.numel, flat, here.start)


def _shard(optimizer: Any, name: str, weight: Any) -> Piece:
    """ZeRO 3 cuts every weight into equal shards, the last of which are filled up."""
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(weight)]
    shape = shape_of(weight)
    start = min(size * dist.get_rank(), math.prod(shape))
    count = min(size, math.prod(shape) - start)
    return Piece(name, shape, start, count, optimizer.fp32_partitioned_groups_flat[group], offset)


def optimizer_of(stage: int, optimizer: Any) -> torch.optim.Optimizer:
    """Torch's optimizer, which DeepSpeed's steps."""
    found: torch.optim.Optimizer = optimizer if stage == 0 else optimizer.optimizer
    return found


def stepped_groups(stage: int, optimizer: Any) -> list[tuple[dict[str, Any], list[torch.Tensor]]]:
    """Each parameter group with the tensors that are stepped in it."""
    groups = optimizer_of(stage, optimizer).param_groups
    if stage != 3:
        return [(group, list(group["params"])) for group in groups]
    held: list[list[torch.Tensor]] = [[] for _ in groups]  # DeepSpeed lends them to the groups for each step
    for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        held[optimizer.sub_group_to_group_id[number]].append(flat)
    return list(zip(groups, held, strict=True))


def state_parts(state: Mapping[torch.Tensor, Mapping[str, Any]], found: Iterable[Piece]) -> list[Part]:
    """The weights' parts and those of every slot of the optimizer."""
    parts: list[Part] = []
    for piece in found:
        parts.append(Part("weights", piece.name, piece.shape, piece.start, piece.of(piece.stepped)))
        for slot, values in state.get(piece.stepped, {}).items():
            if torch.is_tensor(values) and values.shape == piece.stepped.shape and slot != "step":
                parts.append(Part(f"optimizer.{slot}", piece.name, piece.shape, piece.start, piece.of(values)))
    return parts


def factored_parts(
    state: Mapping[torch.Tensor, Mapping[str, Any]], parameters: Mapping[str, torch.Tensor]
) -> list[Part]:
    """Slots that have another shape than their weight, which every rank holds whole: each answers for a share."""
    held = [
        (slot, name, values)
        for name, weight in parameters.items()
        for slot, values in state.get(weight, {}).items()
        if torch.is_tensor(values) and values.shape != weight.shape and slot != "step"
    ]
    cuts = share_of((values.numel() for _, _, values in held), dist.get_rank(), dist.get_world_size())
    return [
        Part(f"optimizer.{slot}", name, tuple(values.shape), start, values.view(-1)[start:stop])
        for (slot, name, values), (start, stop) in zip(held, cuts, strict=True)
        if stop > start
    ]


def _spread(parts: Iterable[Part], replicas: Iterable[tuple[str, str, torch.Tensor]]) -> None:
    """Each element is right on one rank; elsewhere it becomes zero bits, and the sum of the bits is that one."""
    if dist.get_world_size() == 1:
        return
    own = {(part.group, part.name): part for part in parts}
    for group, name, tensor in replicas:
        flat, part = tensor.detach().view(-1), own.get((group, name))
        start, stop = (part.start, part.stop) if part else (0, 0)
        flat[:start] = 0
        flat[stop:] = 0
        dist.all_reduce(flat.view(torch.int32))


class State:
    """This rank's part of the engine's state.

    Args:
        stage: of ZeRO.
        optimizer: DeepSpeed's, or at stage 0 torch's.
        parameters: the module's by name.
        fresh: the optimizer's state of a stepped tensor before its first step.
        disk: where it and what is stepped lie; None where they stay where they are.
    """

    def __init__(
        self,
        stage: int,
        optimizer: Any,
        parameters: Mapping[str, torch.Tensor],
        fresh: Fresh,
        disk: Disk | None = None,
    ) -> None:
        self._stage, self._optimizer, self._parameters = stage, optimizer, parameters
        self.torch_optimizer = optimizer_of(stage, optimizer)
        self.groups = stepped_groups(stage, optimizer)
        for group, tensors in self.groups:
            for tensor in tensors:
                slots = fresh(tensor, group)
                if disk is not None:
                    tensor.data = disk.moved(tensor)
                    large = {slot: values for slot, values in slots.items() if getattr(values, "ndim", 0)}
                    slots |= {slot: disk.moved(values) for slot, values in large.items()}
                self.torch_optimizer.state[tensor] = slots
        self.pieces = pieces(stage, optimizer, parameters)
        state = self.torch_optimizer.state
        self.parts = state_parts(state, self.pieces)
        if stage == 0:
            self.parts += factored_parts(state, parameters)

    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The whole tensors by group and name, of this rank's parts."""
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for part in self.parts:
            found.setdefault(part.group, {})[part.name] = part.shape
        return found

    def scalars(self) -> dict[str, float]:
        """What the optimizer counts, of the first tensor of each group and of the group itself."""
        told: dict[str, float] = {}
        for number, (group, tensors) in enumerate(self.groups):
            for name in COUNTED & set(group):
                told[f"optimizer.{number}.{name}"] = float(group[name])
            for tensor in tensors[:1]:
                if "step" in self.torch_optimizer.state[tensor]:
                    told[f"optimizer.{number}.step"] = float(self.torch_optimizer.state[tensor]["step"])
        return told

    def take(self, source: StateSource) -> None:
        """Be what the source holds. Every rank calls it.

        Raises:
            CheckpointError: it is another network's or another optimizer's.
        """
        ranks.on_every_rank(lambda: self._check(source))  # one that refuses must not leave others waiting
        read_into(self.parts, source)
        for number, (group, tensors) in enumerate(self.groups):
            for name in COUNTED & set(group):
                group[name] = type(group[name])(source.scalars[f"optimizer.{number}.{name}"])
            for tensor in tensors:
                if "step" in self.torch_optimizer.state[tensor]:
                    self.torch_optimizer.state[tensor]["step"].fill_(source.scalars[f"optimizer.{number}.step"])
        self.share()

    def _check(self, source: StateSource) -> None:
        weights = {name: shape_of(weight) for name, weight in self._parameters.items()}
        check_shapes(source.shapes("weights"), weights)
        for group, expected in self.shapes().items():
            found = source.shapes(group)
            if not found:
                raise CheckpointError("The checkpoint is of another optimizer.", value=group, rule="has such a state")
            check_shapes({name: found[name] for name in expected if name in found}, expected)
        for name in set(self.scalars()) - set(source.scalars):
            raise CheckpointError("The checkpoint is of another optimizer.", value=name, rule="has such a number")

    @torch.no_grad()
    def share(self) -> None:
        """After the parts were changed: every copy of every weight is equal to them. Every rank calls it."""
        optimizer = self._optimizer
        if self._stage == 0:
            _spread(self.parts, self._replicas())
        elif self._stage == 3:
            optimizer._partition_all_parameters()  # small weights are kept gathered: what they hold is old
            for number in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        else:
            optimizer.update_lp_params()

    def _replicas(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Every tensor that all ranks hold whole: its group, name and values."""
        for name, weight in self._parameters.items():
            yield "weights", name, weight
            for slot, values in self.torch_optimizer.state[weight].items():
                if torch.is_tensor(values) and slot != "step":
                    yield f"optimizer.{slot}", name, values
