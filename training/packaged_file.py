"""Weights that come inside a Python package: used only if they are exactly the file that was looked at."""

from __future__ import annotations

import hashlib
from pathlib import Path

from training.errors import ConfigError


def require_sha256(file: Path, sha256: str, *, what: str, mend: str) -> None:
    """Refuse any other file.

    Args:
        file: the weights.
        sha256: of the expected file, hexadecimal.
        what: the weights' name, as the subject of the error.
        mend: how to get the expected file.

    Raises:
        ConfigError: it is missing, or another one.
    """
    found = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "no file"
    if found != sha256:
        raise ConfigError(
            f"{what} not the expected file.", value=f"{file}: {found}", rule=f"sha256 {sha256}", mend=mend
        )
