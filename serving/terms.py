"""On which terms a client asks: who it is, until when, how urgently. They come as headers, in every dialect."""

from __future__ import annotations

import math
from dataclasses import dataclass

from starlette.datastructures import Headers

from serving.envelope import ApiError
from serving.keys import ApiKey

DEADLINE = "x-darkroom-deadline-s"
"""Seconds from acceptance after which the client does not want the images any more."""
PRIORITY = "x-darkroom-priority"
"""0, the most urgent, to 9."""
PATIENCE = "x-stainless-read-timeout"
"""Seconds that OpenAI's client waits for the next byte."""
USUAL_PRIORITY = 5
MAX_DEADLINE_S = 86_400.0
_LEAST_URGENT = 9


@dataclass(frozen=True)
class Terms:
    """On which terms a client asks.

    Attributes:
        key: its API key; None where none is asked for.
        deadline_s: seconds from acceptance, as the client says.
        patience_s: seconds that it waits for the next byte of its answer.
        priority: 0, the most urgent, to 9.
        charged: whether its quota pays; not for work that was paid for before.
    """

    key: ApiKey | None = None
    deadline_s: float | None = None
    patience_s: float | None = None
    priority: int = USUAL_PRIORITY
    charged: bool = True


def terms_of(headers: Headers, key: ApiKey | None) -> Terms:
    """What the headers say.

    Raises:
        ApiError: a header makes no sense, or the key does not allow it.
    """
    deadline_s = None
    if (text := headers.get(DEADLINE)) is not None:
        deadline_s = _number(text)
        if deadline_s is None or not 0 < deadline_s <= MAX_DEADLINE_S:
            raise _invalid(DEADLINE, text, f"seconds, above 0 and at most {MAX_DEADLINE_S:g}")
    patience_s = _number(headers.get(PATIENCE, ""))
    return Terms(
        key,
        deadline_s,
        patience_s if patience_s is not None and 0 < patience_s <= MAX_DEADLINE_S else None,
        _priority(headers.get(PRIORITY), key),
    )


def _priority(text: str | None, key: ApiKey | None) -> int:
    ceiling = 0 if key is None else key.priority_ceiling
    if text is None:
        return max(USUAL_PRIORITY, ceiling)
    if not (len(text) == 1 and text.isascii() and text.isdigit()):
        raise _invalid(PRIORITY, text, f"a whole number from 0, the most urgent, to {_LEAST_URGENT}")
    priority = int(text)
    if priority < ceiling:
        message = "This API key may not be so urgent."
        rule = f"{PRIORITY} of {ceiling} to {_LEAST_URGENT}"
        text = f"{message}\n  value:   {priority}\n  rule:    {rule}"
        raise ApiError(403, text, param=PRIORITY, code="priority_not_allowed")
    return priority


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _invalid(name: str, text: str, rule: str) -> ApiError:
    message = f"Invalid value for the header '{name}'.\n  value:   {text[:80]!r}\n  rule:    {rule}"
    return ApiError(400, message, param=name, code="invalid_value")
