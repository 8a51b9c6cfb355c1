"""The models that are served beside the main one, at the same address: what they are called, and where they lie."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

APPLICATION = "darkroom-model-"
"""How the names of their applications in Serve begin; the model's name follows."""
PATH = "/darkroom-model"
"""Below it lie their routes, each by its model's name."""
NAME = re.compile(r"[\w-][\w.-]{0,99}", re.ASCII)
"""Names that can be part of a route."""
HEADER = "x-darkroom-beside"
"""In which the proxy tells replicas of them."""

_names: ContextVar[tuple[str, ...]] = ContextVar("beside", default=())


def names() -> tuple[str, ...]:
    """The other models that a request may choose, as the proxy told this replica."""
    return _names.get()


@contextmanager
def told(text: str | None) -> Iterator[None]:
    """Inside, ``names`` returns what a header said."""
    token = _names.set(tuple(name for name in (text or "").split(", ") if NAME.fullmatch(name)))
    try:
        yield
    finally:
        _names.reset(token)
