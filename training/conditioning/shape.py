"""What a network must know of its conditioning to be built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ConditioningShape:
    """Of the rows of a ``Conditioning``.

    Attributes:
        kind: ``text`` has a state per token; ``class`` has one token of width 1 that holds a class's number, of which
            ``classes`` is the unconditional one; ``none`` has the same token, always 0.
        tokens: per row.
        width: of a token.
        pooled: width of the pooled state; 0 where the encoder has none.
        classes: how many there are.
    """

    kind: Literal["text", "class", "none"]
    tokens: int = 1
    width: int = 1
    pooled: int = 0
    classes: int = 0
