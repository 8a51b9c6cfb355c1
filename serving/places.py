"""Paths in a deployment's settings: replicas run wherever Ray starts them, so a relative one would mean anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator


def _absolute(text: str) -> str:
    if not Path(text).expanduser().is_absolute():
        raise ValueError(f"{text!r} must be an absolute path: replicas have another working directory")
    return text


Place = Annotated[str, AfterValidator(_absolute)]
"""An absolute path, or one that begins with ``~``."""
