"""The state of one rank, in parts that any other world size and stage can be put together from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from training.errors import CheckpointError


@dataclass(frozen=True)
class Part:
    """Some consecutive elements of a tensor, which this rank holds.

    Attributes:
        group: ``weights``, ``ema``, ``ema_<name>`` or ``optimizer.<slot>``.
        name: the weight's, as in the trained module's ``named_parameters()``.
        shape: of the whole tensor.
        start: the first element in the flattened whole tensor.
        values: flat; this rank's elements, as live views where possible.
    """

    group: str
    name: str
    shape: tuple[int, ...]
    start: int
    values: torch.Tensor

    @property
    def stop(self) -> int:
        """The element after the last."""
        return self.start + self.values.numel()


class StateSource(Protocol):
    """What a state is read back from."""

    @property
    def scalars(self) -> Mapping[str, float]:
        """What the engine's ``scalars()`` told."""
        ...

    def shapes(self, group: str) -> Mapping[str, tuple[int, ...]]:
        """The whole tensors of a group by name; none where there is no such group."""
        ...

    def read(self, group: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements ``start`` to ``stop`` of the flattened tensor: flat, on the CPU."""
        ...


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Whether a state is that of this network.

    Raises:
        CheckpointError: it has other names or shapes.
    """
    for name in sorted(set(expected) ^ set(found)):
        raise CheckpointError("The checkpoint belongs to another network.", value=name, rule="the same weight names")
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise CheckpointError(
                f"The checkpoint belongs to another network: {name} has another shape.",
                value=tuple(found[name]),
                rule=f"{shape}",
            )


@torch.no_grad()
def read_into(parts: Iterable[Part], source: StateSource) -> None:
    """Copy from a source into the parts' own memory."""
    for part in parts:
        part.values.copy_(source.read(part.group, part.name, part.start, part.stop))


@torch.no_grad()
def gather(parts: Iterable[Part], device: torch.device) -> dict[str, torch.Tensor]:
    """The whole tensors of one group, on every rank; bit for bit, because all but one rank add zero bits.

    Every rank calls it, with parts of the same group; their values are float32.
    """
    mine: dict[str, list[Part]] = {}
    for part in parts:
        mine.setdefault(part.name, []).append(part)
    known: list[dict[str, tuple[int, ...]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(known, {name: held[0].shape for name, held in mine.items()})
    shapes = dict(sorted({name: shape for each in known for name, shape in each.items()}.items()))
    # one tensor for all: hundreds of small sums would each wait for every rank
    flat = torch.zeros(sum(map(math.prod, shapes.values())), device=device)
    whole: dict[str, torch.Tensor] = {}
    place = 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        here = flat[place : place + count]
        for part in mine.get(name, ()):
            here[part.start : part.stop] = part.values
        whole[name] = here.view(shape)
        place += count
    dist.all_reduce(flat.view(torch.int32))
    return whole
