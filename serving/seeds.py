"""The seed of a request that names none.

Serve's proxy draws it once and tells it to every replica that it tries (``HEADER``): when a replica dies, the next one
makes the same picture.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

HEADER = "x-darkroom-seed"
"""What the proxy calls it."""
LIMIT = 2**32
"""Drawn seeds are below."""

_told: ContextVar[int | None] = ContextVar("seed", default=None)


def draw_seed() -> int:
    """The seed that the proxy drew for the request that is being answered; a new one where no proxy did."""
    told = _told.get()
    return secrets.randbelow(LIMIT) if told is None else told


@contextmanager
def told(text: str | None) -> Iterator[None]:
    """Inside, ``draw_seed`` returns what a header said; a header that is no seed says nothing."""
    is_seed = text is not None and text.isascii() and text.isdigit() and len(text) <= 10 and int(text) < LIMIT
    token = _told.set(int(text) if text and is_seed else None)
    try:
        yield
    finally:
        _told.reset(token)
