"""The time that DeepSpeed's collectives take, wherever in a step it calls them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed.comm.comm as deepspeed_comm

from training.stopwatch import Stopwatch

_TIMED = (
    "all_reduce",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "reduce_scatter_tensor",
    "reduce",
    "broadcast",
)
_clock: list[Stopwatch] = []
"""The running step's."""


@contextmanager
def collectives_on(clock: Stopwatch) -> Iterator[None]:
    """Collectives that DeepSpeed calls meanwhile are the clock's section ``communication``."""
    _clock.append(clock)
    try:
        yield
    finally:
        _clock.pop()


def time_collectives() -> None:
    """From now on; DeepSpeed has one backend for a process, and this may be called again."""
    backend = deepspeed_comm.cdb
    for name in _TIMED:
        plain = getattr(backend, name)
        if not hasattr(plain, "is_timed"):
            setattr(backend, name, _timed(plain))


def _timed(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def call(*arguments: Any, **options: Any) -> Any:
        if not _clock:
            return plain(*arguments, **options)
        with _clock[-1]("communication"):
            handle = plain(*arguments, **options)
        return _Handle(handle) if hasattr(handle, "wait") else handle

    call.is_timed = True  # type: ignore[attr-defined]  # a mark on a function
    return call


class _Handle:
    """A collective that runs on: waiting for it is communication too."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def wait(self, *arguments: Any) -> Any:
        if not _clock:
            return self._handle.wait(*arguments)
        with _clock[-1]("communication"):
            return self._handle.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)
