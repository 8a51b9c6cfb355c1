"""What a run was made with: code, lock file, versions. And what of it must not be written down."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "ray", "deepspeed", "diffusers", "transformers", "mlflow")
_SECRET_NAME = re.compile(r"token|key|password|passwd|secret|credential", re.IGNORECASE)
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_MASK = "***"


def provenance_tags(repository: Path) -> dict[str, str]:
    """Tags that tie a run to its code and environment.

    Args:
        repository: the directory with ``requirements.lock``; its git commit is read where it is a checkout.

    Returns:
        ``mlflow.source.name``, without which MLflow's pages hide the commit; ``mlflow.source.git.commit`` and
        ``darkroom.git_dirty`` (only in a git checkout); ``darkroom.lock_sha256`` (only where the lock file is);
        ``darkroom.version.<package>``.
    """
    tags = {"mlflow.source.name": "darkroom", **_git_tags(repository)}
    lock = repository / "requirements.lock"
    if lock.is_file():
        tags["darkroom.lock_sha256"] = hashlib.sha256(lock.read_bytes()).hexdigest()
    for package in _PACKAGES:
        try:
            tags[f"darkroom.version.{package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return tags


def _git_tags(repository: Path) -> dict[str, str]:
    """The commit, and whether tracked files differ from it; nothing where git or its history is missing."""
    commit = _git(repository, "rev-parse", "HEAD")
    changes = _git(repository, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return {}
    return {"mlflow.source.git.commit": commit, "darkroom.git_dirty": str(bool(changes)).lower()}


def _git(repository: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def mask_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same configuration with secrets replaced by ``***``.

    Text is masked where its name, or the name of something that holds it, says token, key, password, secret or
    credential; numbers are not (``max_tokens: 24`` stays). Logins inside URLs are masked everywhere.
    """
    return {str(name): _mask(value, bool(_SECRET_NAME.search(str(name)))) for name, value in config.items()}


def _mask(value: Any, secret: bool) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _mask(part, secret or bool(_SECRET_NAME.search(str(name)))) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_mask(part, secret) for part in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return _MASK if secret else mask_logins(str(value))


def mask_logins(text: str) -> str:
    """The text with the logins inside its URLs replaced by ``***``."""
    return _URL_LOGIN.sub(_MASK, text)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"model": {"widths": [1, 2]}}`` as ``{"model.widths": "[1, 2]"}``, values cut to MLflow's 500 characters."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            text = str(value)
            flat[f"{prefix}{name}"] = text if len(text) <= 500 else text[:497] + "..."
    return flat
