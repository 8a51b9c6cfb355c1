"""Where a pipeline's files are: a directory, or the cache of the Hugging Face hub."""

from __future__ import annotations

import json
import re
from pathlib import Path

from training.errors import ConfigError
from training.finetune.files import those_read

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@(?!.*(\.\.|//))\w[\w./-]*)?")
"""A revision is a branch, a tag or a commit, and no path that leads elsewhere."""
_INDEX = "model_index.json"


def pipeline_directory(reference: str) -> Path:
    """The directory of a pipeline; one of the hub is fetched into its cache first.

    Of a pipeline on the hub, what is read of its parts is fetched, and of weights those of one precision.

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
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = reference.partition("@")
    try:
        return Path(_fetched(name, revision or None)).resolve()
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ConfigError(
            "The Hugging Face hub does not give this pipeline.",
            value=reference,
            rule=str(error).strip().splitlines()[0],
            mend="fetch it where there is a network, and name the directory: start.pipeline=DIR",
        ) from error


def _fetched(name: str, revision: str | None) -> str:
    from httpx2 import TransportError
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        files = HfApi().list_repo_files(name, revision=revision)
    except (TransportError, OfflineModeIsEnabled):  # what was fetched before; whether it is whole is looked at later
        return snapshot_download(name, revision=revision, allow_patterns=[_INDEX], local_files_only=True)
    index = json.loads(Path(hf_hub_download(name, _INDEX, revision=revision)).read_bytes())
    wanted = [_INDEX]
    for part in index:  # single-file copies of all weights, and parts of other pipelines, lie beside
        inside = [file.removeprefix(f"{part}/") for file in files if file.startswith(f"{part}/")]
        wanted += [f"{part}/{file}" for file in those_read(inside) if "/" not in file]
    return snapshot_download(name, revision=revision, allow_patterns=wanted)
