"""Where a pipeline's files are: a directory, or the cache of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from training.errors import ConfigError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_WANTED = ("*.json", "*.txt", "*.model", "*.safetensors", "*.jinja")
"""Configs, tokenizers and safetensors: nothing pickled and no code is fetched."""


def pipeline_directory(reference: str) -> Path:
    """The directory of a pipeline; one of the hub is fetched into its cache first.

    Args:
        reference: a directory, or ``org/name`` or ``org/name@revision``.

    Raises:
        ConfigError: there is no such directory, or the hub does not give it.
    """
    directory = Path(reference).expanduser()
    if directory.is_dir():
        return directory.resolve()
    if not _ID.fullmatch(reference):
        raise ConfigError(
            "The pipeline cannot be found.",
            value=reference,
            rule="a directory on this machine, or an id of the Hugging Face hub",
            options=["/path/to/pipeline", "org/name", "org/name@revision"],
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = reference.partition("@")
    # single-file copies of all weights lie at the top of some repositories
    wanted = ["model_index.json", *(f"*/{each}" for each in _WANTED)]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted)).resolve()
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            "The Hugging Face hub does not give this pipeline.",
            value=reference,
            rule=str(error).strip().splitlines()[0],
            mend="fetch it where there is a network, and name the directory: start.pipeline=DIR",
        ) from error
