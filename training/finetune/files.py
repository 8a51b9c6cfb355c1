"""Which files of a pipeline are ever read, by their names alone, and how a part is loaded from them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from training.errors import ConfigError

_READ = ("*.json", "*.txt", "*.model", "*.safetensors", "*.jinja")
"""Configs, tokenizers and safetensors: nothing pickled and no code."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
"""Ends of the names of weights that are not: reading a pickle can run anything."""
_WEIGHTS = re.compile(r"[^.]+(\.(?P<variant>[^.]+?))?(-\d+-of-\d+)?(\.(?P<later>[^.]+))?\.safetensors")
_LISTING = re.compile(r"[^.]+\.safetensors\.index(\.(?P<variant>[^.]+))?\.json")


def those_read(names: Iterable[str]) -> list[str]:
    """Of the files in a part's folder, those that are ever read: of its weights, those of one precision.

    Args:
        names: of all its files.
    """
    wanted = sorted(name for name in names if any(fnmatch(name, pattern) for pattern in _READ))
    variant = variant_of(wanted)
    return [name for name in wanted if not _is_weights(name) or _variant(name) == variant]


def variant_of(names: Iterable[str]) -> str | None:
    """The word that diffusers puts into the names of weights of another precision, where there are no others."""
    found = [_variant(name) for name in sorted(names) if name.endswith(".safetensors")]
    return None if not found or None in found else found[0]


def weights_variant(folder: Path) -> str | None:
    """``variant_of`` the files in a folder."""
    return variant_of(path.name for path in folder.iterdir())


def load_part(kind: Any, folder: Path, what: str, **options: Any) -> Any:
    """A part of a pipeline with its weights, from files on this machine that hold nothing but tensors.

    Args:
        kind: the class, of diffusers or transformers.
        folder: the part's.
        what: to call it in an error.
        options: more for ``from_pretrained``.

    Raises:
        ConfigError: it does not load.
    """
    try:
        variant = weights_variant(folder)
        return kind.from_pretrained(folder, use_safetensors=True, local_files_only=True, variant=variant, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{what} does not load.", value=str(folder), rule=str(error)) from error


def plain(name: str) -> str:
    """The name of a file of weights without that word: what is looked for unasked."""
    variant = _variant(name) if _is_weights(name) else None
    return name if variant is None else name.replace(f".{variant}", "", 1)


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") or _LISTING.fullmatch(name) is not None


def _variant(name: str) -> str | None:
    found = _LISTING.fullmatch(name) or _WEIGHTS.fullmatch(name)
    return None if found is None else found["variant"] or found.groupdict().get("later")
