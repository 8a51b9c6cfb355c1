"""Checkpoints: whole or absent, checked, and readable without running anything from them.

A checkpoint is a folder ``step-00000120`` with a few safetensors files of each rank and ``checkpoint.json``, which
carries every file's sha256 and is written when all of them are on disk. On a file system the folder gets its name
after that; in a bucket a folder without a manifest is none.
"""

from __future__ import annotations

from training.checkpoint.config import CheckpointConfig
from training.checkpoint.manifest import NAME as MANIFEST
from training.checkpoint.stored import Checkpoint, found_in, newest, place, read
from training.checkpoint.whole import save

__all__ = ["MANIFEST", "Checkpoint", "CheckpointConfig", "found_in", "newest", "place", "read", "save"]
