"""The states of a list of captions, computed once and kept beside the data set."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

from training.conditioning import Conditioning, TextConfig, TextEncoder, directory_hash, encoder_directory


def embeddings_path(folder: Path, config: TextConfig, captions: Sequence[str]) -> Path:
    """Where these captions' states are kept; the name holds the encoder's hash and the captions'."""
    encoder = directory_hash(encoder_directory(config.encoder), config.max_tokens)
    digest = hashlib.sha256(encoder.encode())
    for caption in captions:
        digest.update(b"\x00" + caption.encode())
    return folder / f"text-{digest.hexdigest()[:32]}.safetensors"


def ensure_embedded(folder: Path, config: TextConfig, captions: Sequence[str]) -> Path:
    """Compute the states of ``captions`` unless they are kept already; returns their file.

    Two processes may compute the same file at once: both write the same bytes, and a rename decides.
    """
    path = embeddings_path(folder, config, captions)
    if not path.is_file():
        states = TextEncoder.from_config(config).encode(captions)
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        save_file({"tokens": states.tokens, "mask": states.mask}, partial)
        partial.rename(path)
    return path


def embed_once(folder: Path, config: TextConfig, captions: Sequence[str]) -> Conditioning:
    """States of ``captions``, one row each, from the cache or computed now and kept."""
    loaded = load_file(ensure_embedded(folder, config, captions))  # mapped: rows are read when they are used
    return Conditioning(loaded["tokens"], loaded["mask"])
