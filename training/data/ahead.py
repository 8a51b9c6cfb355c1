"""Work that waits for storage or the network, begun before its turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[tuple[Item, Future[Result]]]:
    """Each item in order with its work, which ``threads`` items further on has begun already."""
    begun: deque[tuple[Item, Future[Result]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="ahead") as pool:
        try:
            for item in items:
                begun.append((item, pool.submit(function, item)))
                if len(begun) > threads:
                    yield begun.popleft()
            yield from begun
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
