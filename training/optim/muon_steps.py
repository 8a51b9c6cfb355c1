"""Muon's steps on whatever DeepSpeed has made of the weights: whole matrices, or flat tensors with pieces of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Jordan et al. 2024: steepest at zero; singular values end between about 0.7 and 1.2."""


class Piece(Protocol):
    """See ``training.parallel_state.Piece``."""

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    stepped: torch.Tensor
    offset: int


@dataclass(frozen=True)
class _Matrix:
    """A matrix in a stepped tensor.

    Attributes:
        shape: of the whole.
        start: this rank's first element of it.
        count: this rank's elements; 0 where it has none.
        offset: where they begin in the stepped tensor.
        shared: whether other ranks have the others, so that all must come together.
    """

    shape: tuple[int, ...]
    start: int
    count: int
    offset: int
    shared: bool


class MuonSteps(torch.optim.Optimizer):
    """Muon and AdamW in one optimizer; groups say with ``muon`` which of them they are.

    Args:
        groups: the weights.
        defaults: of all groups.
        adamw: what torch's AdamW is given besides.

    Attributes:
        orthogonalised: matrices that this rank has made orthogonal so far.
        matrices: those of a step.
    """

    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any], adamw: dict[str, Any]) -> None:
        super().__init__(groups, defaults)
        self.orthogonalised = self.matrices = 0
        self._matrices: dict[int, list[_Matrix]] = {}
        rest = [group for group in self.param_groups if not group["muon"]]
        # the groups and the state are the same objects: what DeepSpeed changes in them holds for both
        self._adamw = torch.optim.AdamW(rest, **adamw) if rest else None
        if self._adamw is not None:
            self._adamw.state = self.state

    def bind(self, pieces: Iterable[Piece], groups: Iterable[tuple[dict[str, Any], list[torch.Tensor]]]) -> None:
        """Learn where the matrices are. Every rank calls it, before the first step.

        Args:
            pieces: this rank's.
            groups: the parameter groups and the tensors that are stepped in them.
        """
        mine: dict[int, dict[str, Piece]] = {}
        for piece in pieces:
            mine.setdefault(id(piece.stepped), {})[piece.name] = piece
        for group, tensors in groups:
            if not group["muon"]:
                continue
            for tensor in tensors:
                if tensor.ndim == 2:
                    self._matrices[id(tensor)] = [_Matrix(tuple(tensor.shape), 0, tensor.numel(), 0, shared=False)]
                else:
                    self._matrices[id(tensor)] = _flat(mine.get(id(tensor), {}))
        self.matrices = sum(matrix.count > 0 for found in self._matrices.values() for matrix in found)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of the groups that have tensors with gradients."""
        for group in self.param_groups:
            if group["muon"]:
                for tensor in group["params"]:
                    if tensor.grad is not None:
                        self._move(tensor, group)
            elif self._adamw is not None and group["params"]:
                self._adamw.param_groups = [group]
                self._adamw.step()
        return None if closure is None else closure()

    def _move(self, tensor: torch.Tensor, group: dict[str, Any]) -> None:
        momentum, beta = self.state[tensor]["momentum"], group["momentum"]
        gradient = tensor.grad
        momentum.lerp_(gradient, 1 - beta)
        wanted = torch.lerp(gradient, momentum, beta).view(-1)  # type: ignore[arg-type]  # there is one
        tensor.mul_(1 - group["lr"] * group["weight_decay"])
        flat = tensor.view(-1)
        for matrix in self._matrices[id(tensor)]:
            here = slice(matrix.offset, matrix.offset + matrix.count)
            if matrix.shared:
                whole = wanted.new_zeros(math.prod(matrix.shape))
                whole[matrix.start : matrix.start + matrix.count] = wanted[here]
                dist.all_reduce(whole)  # one rank's number and zeros
                if not matrix.count:
                    continue
            else:
                whole = wanted[here]
            update = orthogonal(whole.view(matrix.shape), group["iterations"]).reshape(-1)
            rate = group["lr"] * 0.2 * math.sqrt(max(matrix.shape))
            flat[here].add_(update[matrix.start : matrix.start + matrix.count], alpha=-rate)
            self.orthogonalised += 1


def _flat(mine: dict[str, Piece]) -> list[_Matrix]:
    """The matrices of a flat tensor that any rank has a piece of, in the order in which all ranks come to them."""
    known: list[list[tuple[str, tuple[int, ...], int]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(known, [(piece.name, piece.shape, piece.count) for piece in mine.values()])
    found: list[_Matrix] = []
    for name, shape, count in sorted(
        {name: (name, shape, count) for each in known for name, shape, count in each}.values()
    ):
        shared = count < math.prod(shape)
        piece = mine.get(name)
        if piece is not None:
            found.append(_Matrix(shape, piece.start, piece.count, piece.offset, shared))
        elif shared:
            found.append(_Matrix(shape, 0, 0, 0, shared))
    return found


def orthogonal(matrix: torch.Tensor, iterations: int) -> torch.Tensor:
    """Nearly the orthogonal matrix nearest to ``[A,B]``: Newton-Schulz on its singular values (Jordan et al. 2024).

    In bf16 on a GPU, whose matrix units are made for it; in fp32 on a CPU.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.bfloat16() if matrix.is_cuda else matrix.clone()
    tall = matrix.shape[0] > matrix.shape[1]
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)
