"""Files that a cleaning config names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


Named = Annotated[Path, AfterValidator(_absolute)]
"""A path made absolute where the config is read: workers elsewhere have another current folder."""
