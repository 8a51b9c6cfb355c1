"""``darkroom.json``: what a bundle says about itself, and whether its folder holds just that."""

from __future__ import annotations

import hashlib
import os
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training.bundle_told import Told
from training.errors import CheckpointError
from training.objectives import ObjectiveConfig

MANIFEST = "darkroom.json"
_MEND = "publish the bundle again, or fetch it again from the registry"


class Provenance(BaseModel):
    """Where a model comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    """The MLflow run that trained it."""
    data_hash: str
    """The name of the data set, sha256 hex."""
    use_digest: str = ""
    """What the training has consumed, step by step, as ``darkroom data audit`` recomputes it; hexadecimal."""
    recipe: dict[str, Any]
    """The full recipe."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Final metrics, e.g. ``held_out_loss`` and ``kid_held_out``."""
    licences: dict[str, int] = Field(default_factory=dict)
    """Training pictures under each licence."""
    created_utc: str
    """ISO 8601."""
    step: int = Field(ge=0)
    """Optimizer steps taken."""
    code_version: str
    """The git commit that trained it."""


class FileRecord(BaseModel):
    """One file's size and checksum."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int = Field(ge=0)
    """Size."""
    sha256: str
    """Lower-case hex."""


class BundleManifest(BaseModel):
    """The contents of ``darkroom.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2] = 2
    """Version of this file's layout."""
    network: Literal["unet", "transformer"]
    """The folder of the network."""
    objective: ObjectiveConfig
    """What the network predicts, and when it is asked."""
    conditioning: Told
    """What the network is told."""
    latents: bool
    """Whether it draws latents, which the autoencoder in ``vae`` decodes, and not pixels."""
    resolution: int = Field(ge=1)
    """Side of the square pictures, in pixels."""
    provenance: Provenance
    """Where the model comes from."""
    files: dict[str, FileRecord]
    """Every other file by its path inside the bundle, with forward slashes."""

    @property
    def core(self) -> tuple[str, ...]:
        """Patterns of the files that it cannot do without; a big network's weights come in several files."""
        parts: list[str] = [self.network]
        captions = self.conditioning.kind in ("text", "pipeline")
        if captions:
            parts.append("text_encoder")
        if self.latents:
            parts.append("vae")
        weights = [f"{part}/{name}" for part in parts for name in ("config.json", "*.safetensors")]
        tokenizer = ["tokenizer/tokenizer_config.json"] if captions else []
        return ("model_index.json", "scheduler/scheduler_config.json", *weights, *tokenizer)


def records_of(folder: Path) -> dict[str, FileRecord]:
    """Size and checksum of every file under a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _record(path) for path in paths}


def _record(path: Path) -> FileRecord:
    with path.open("rb") as stream:
        return FileRecord(bytes=path.stat().st_size, sha256=hashlib.file_digest(stream, "sha256").hexdigest())


def read_manifest(path: Path) -> BundleManifest:
    """A bundle's ``darkroom.json``.

    Raises:
        CheckpointError: it is missing or not valid.
    """
    file = path / MANIFEST
    try:
        return BundleManifest.model_validate_json(file.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            "This is not a bundle.", value=str(path), rule=f"a directory with {MANIFEST}", mend=_MEND
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise CheckpointError(
            f"The bundle's {MANIFEST} is not valid.", value=str(file), rule=f"{where}: {first['msg']}", mend=_MEND
        ) from error


def manifest_sha256(path: Path) -> str:
    """The checksum of a bundle's ``darkroom.json``, which holds those of all its files: one name for its contents.

    Raises:
        CheckpointError: it is missing.
    """
    try:
        return _record(path / MANIFEST).sha256
    except FileNotFoundError as error:
        raise CheckpointError(
            "This is not a bundle.", value=str(path), rule=f"a directory with {MANIFEST}", mend=_MEND
        ) from error


def verify_bundle(path: Path) -> BundleManifest:
    """Check every file of a bundle against its checksum, and that there are no others.

    Raises:
        CheckpointError: a file is missing, has changed, was added, or is named outside the bundle; the message
            names it.
    """
    manifest = read_manifest(path)
    _check_names(manifest)
    _refuse_strangers(path, {MANIFEST, *manifest.files})
    for name, record in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError("A file of the bundle is missing.", value=str(file), rule=MANIFEST, mend=_MEND)
        if _record(file) != record:
            raise CheckpointError(
                "A file of the bundle has changed.",
                value=str(file),
                rule=f"sha256 {record.sha256}, {record.bytes} bytes, as {MANIFEST} says",
                mend=_MEND,
            )
    return manifest


def _check_names(manifest: BundleManifest) -> None:
    """Every listed path lies inside the bundle, and what a pipeline needs is listed."""
    for name in manifest.files:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise CheckpointError(
                "The bundle names a file outside itself.", value=name, rule="paths inside the bundle", mend=_MEND
            )
    for pattern in manifest.core:
        if not any(fnmatchcase(name, pattern) for name in manifest.files):
            raise CheckpointError(
                "The bundle is incomplete.", value=pattern, rule=f"{MANIFEST} lists it with its checksum", mend=_MEND
            )


def _refuse_strangers(path: Path, known: set[str]) -> None:
    """No file and no link but the listed ones: loaders prefer some names, such as an index of weights, to ours."""
    for folder, subfolders, files in os.walk(path):
        links = [name for name in subfolders if (Path(folder) / name).is_symlink()]
        for name in sorted([*files, *links]):
            file = Path(folder) / name
            if file.relative_to(path).as_posix() not in known:
                raise CheckpointError(
                    "The bundle holds a file that nobody vouches for.",
                    value=str(file),
                    rule=f"only files whose checksums {MANIFEST} lists",
                    mend=f"remove it, or {_MEND}",
                )
