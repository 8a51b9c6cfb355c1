"""What the ranks of a run do together. Every rank calls these at the same point, and all go on or none does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from training.errors import DarkroomError, TrainingError

T = TypeVar("T")


def on_rank_zero(action: Callable[[], T]) -> T:
    """Rank 0 acts, and every rank gets what came of it.

    Raises:
        DarkroomError: what rank 0 raised; any other error of its own reaches the others as a ``TrainingError``.
    """
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:  # noqa: BLE001  raised below, after the others, who wait, have been told
            failure = error
            outcome[1] = _as_typed(error)
    dist.broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def on_every_rank(action: Callable[[], T]) -> T:
    """Every rank acts for itself, and none goes on where one failed.

    Raises:
        DarkroomError: what the first rank that failed raised.
    """
    failure: Exception | None = None
    result: Any = None
    try:
        result = action()
    except Exception as error:  # noqa: BLE001  raised below, after the others have been told
        failure = error
    failures: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, None if failure is None else _as_typed(failure))
    if failure is not None:
        raise failure
    for told in failures:
        if told is not None:
            raise told
    mine: T = result
    return mine


def _as_typed(error: Exception) -> DarkroomError:
    if isinstance(error, DarkroomError):
        return error
    return TrainingError(f"Rank {dist.get_rank()} failed: {type(error).__name__}: {error}")


def total(*values: int) -> list[int]:
    """The sum of each whole number over the ranks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    summed = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(summed)
    numbers: list[int] = summed.tolist()
    return numbers


def gather(value: T) -> list[T]:
    """What every rank brings, by rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone
