"""The manifest: what a data set holds, the checksums of its files, and the hash that names it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training.data.captions import canonical
from training.data.config import BuildConfig
from training.data.storage import Folder
from training.errors import DataError

MANIFEST = "manifest.json"
SCHEMA_VERSION: Literal[2] = 2
_CHUNK_BYTES = 8_000_000
SplitName = Literal["train", "held_out"]
SPLITS: tuple[SplitName, ...] = ("train", "held_out")


class SplitFacts(BaseModel):
    """One split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int
    """Samples."""
    image_bytes: int
    """Encoded bytes of its pictures."""
    index: str
    """The index's file name."""
    shards: tuple[str, ...]
    """The shards' file names, in the order of the index's shard numbers."""


class FileFacts(BaseModel):
    """One file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size_bytes: int
    """Its size."""
    sha256: str
    """Of its bytes, hexadecimal."""


class Manifest(BaseModel):
    """The whole data set; equal sources and configs give equal manifests, byte for byte."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[2] = 2
    """Of this file and of the index."""
    hash: str
    """Names the data set: sha256 over what a reader of the samples can see."""
    config: BuildConfig
    """What the build was asked for."""
    source_digest: str
    """Sha256 over the source's pictures and fields, dropped ones included."""
    generation: int = Field(default=0, ge=0)
    """How often the data set was replaced file by file, where files cannot be renamed or samples were forgotten."""
    ledger: str = "ledger.parquet"
    """The ledger's file name."""
    inputs: int
    """Rows of the ledger: kept + dropped."""
    kept: int
    """Samples in the splits."""
    without_caption: int
    """Samples whose caption is empty."""
    dropped: dict[str, int]
    """Inputs dropped, by rule."""
    licences: dict[str, int]
    """Samples by the licence stated beside the picture; ``unstated`` where none is, ``other`` for rare ones."""
    splits: dict[SplitName, SplitFacts]
    """Both splits; ``held_out`` may be empty."""
    files: dict[str, FileFacts]
    """Every file of the data set but this one."""

    def as_json(self) -> str:
        """The file's content."""
        return self.model_dump_json(indent=2) + "\n"


def content_hash(splits: dict[SplitName, SplitFacts], files: dict[str, FileFacts], background: str) -> str:
    """Sha256 over the canonical JSON of the shards, their indexes and how transparent pixels are shown.

    The ledger is left out: what was dropped does not change what a reader sees, the samples' keys included. So are the
    files' names, which say where the samples lie and not what they are.
    """
    facts = {
        "schema_version": SCHEMA_VERSION,
        "background": background,
        "splits": {
            name: {
                "count": split.count,
                "files": [files[part].sha256 for part in (split.index, *split.shards)],
            }
            for name, split in splits.items()
        },
    }
    return hashlib.sha256(canonical(facts)).hexdigest()


def file_facts(path: Path) -> FileFacts:
    """Size and checksum of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileFacts(size_bytes=path.stat().st_size, sha256=digest)


def read_manifest(dataset: Path | Folder) -> Manifest:
    """The manifest of a finished data set; it must agree with itself.

    Raises:
        DataError: no data set there, another schema, or a manifest that was edited.
        StorageError: storage does not answer.
    """
    folder = dataset if isinstance(dataset, Folder) else Folder.at(dataset)
    path = folder.url(MANIFEST)
    build = f"darkroom data build SOURCE {dataset}"
    mend = f"{build} --force"
    try:
        manifest = Manifest.model_validate_json(folder.read(MANIFEST))
    except OSError as error:
        rule = f"a folder that `darkroom data build` made, with {MANIFEST}"
        raise DataError("There is no data set.", value=str(dataset), rule=rule, mend=build) from error
    except ValidationError as error:
        first = error.errors()[0]
        rule = f"schema version {SCHEMA_VERSION}; {'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise DataError("The data set's manifest is not valid.", value=path, rule=rule, mend=mend) from error
    listed = {manifest.ledger}.union(*((split.index, *split.shards) for split in manifest.splits.values()))
    unsafe = [name for name in manifest.files if Path(name).name != name]
    if unsafe or not listed <= set(manifest.files) or set(manifest.splits) != set(SPLITS):
        rule = "both splits, and a checksum for each of their files, all inside the data set's folder"
        raise DataError("The data set's manifest is not valid.", value=path, rule=rule, mend=mend)
    if content_hash(manifest.splits, manifest.files, manifest.config.background) != manifest.hash:
        rule = "the hash is recomputed from the counts and checksums"
        raise DataError("The data set's manifest was changed.", value=manifest.hash, rule=rule, mend=mend)
    return manifest


def check_files(dataset: Path | Folder, manifest: Manifest, *, checksums: bool = False) -> None:
    """Every file is there with its size and, if asked for, its checksum.

    Raises:
        DataError: naming the files that are missing or differ.
        StorageError: storage does not answer.
    """
    folder = dataset if isinstance(dataset, Folder) else Folder.at(dataset)
    there = {stored.name: stored.size for stored in folder.files()}
    wrong = []
    for name, facts in manifest.files.items():
        if name not in there:
            wrong.append(f"{name} is missing")
        elif there[name] != facts.size_bytes:
            wrong.append(f"{name} has {there[name]} bytes, not {facts.size_bytes}")
        elif checksums and _sha256(folder, name, facts.size_bytes) != facts.sha256:
            wrong.append(f"{name} has another sha256")
    if wrong:
        raise DataError(
            f"The data set is damaged: {'; '.join(wrong[:5])}.",
            value=str(dataset),
            rule=f"files as {MANIFEST} lists them",
            mend="build it again with --force",
        )


def _sha256(folder: Folder, name: str, size: int) -> str:
    digest = hashlib.sha256()
    for start in range(0, size, _CHUNK_BYTES):
        digest.update(folder.read_range(name, start, _CHUNK_BYTES))
    return digest.hexdigest()
