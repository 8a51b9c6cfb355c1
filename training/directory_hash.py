"""The name of a model directory's contents."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

_COUNTS = {".json", ".safetensors", ".txt", ".model"}
"""Weights, configs and vocabularies; a licence's or a readme's text changes nothing that is computed."""


@lru_cache(maxsize=8)
def directory_hash(directory: Path) -> str:
    """Sha256 over the names and contents of a model's files; read once per process."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*")):
        if path.suffix in _COUNTS and path.is_file():
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
