"""The bundle: what training hands to serving, a standard diffusers pipeline directory plus provenance.

bundle/
  model_index.json  pipeline.py      DiffusionPipeline.from_pretrained(bundle, trust_remote_code=True)
  unet/  text_encoder/               safetensors weights and their configs
  tokenizer/  scheduler/
  darkroom.json                      run, data, recipe, metrics, licences, and a checksum of every other file
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training.errors import CheckpointError

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from training.conditioning import TextEncoder
    from training.objectives import Denoiser, Network

MANIFEST = "darkroom.json"
_MEND = "publish the bundle again, or fetch it again from the registry"


class Provenance(BaseModel):
    """Where a model comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    """The MLflow run that trained it."""
    data_hash: str
    """The name of the data set, sha256 hex."""
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

    format: Literal[1] = 1
    """Version of this file's layout."""
    objective: Literal["rectified_flow"] = "rectified_flow"
    """What the network predicts."""
    resolution: int = Field(ge=1)
    """Side of the square pictures, in pixels."""
    max_tokens: int = Field(ge=1)
    """Longest prompt, in tokens."""
    time_shift: float = Field(gt=0)
    """The sampler's shift of time (Esser et al. 2024, eq. 23)."""
    text_encoder_hash: str
    """``TextEncoder.hash`` of the encoder that training used."""
    provenance: Provenance
    """Where the model comes from."""
    files: dict[str, FileRecord]
    """Every other file by its path inside the bundle, with forward slashes."""


@dataclass(frozen=True)
class LoadedBundle:
    """A bundle in memory, ready for a sampler.

    Attributes:
        network: the raw network behind the network contract.
        denoiser: what samplers and the serving engine call.
        encoder: captions to conditioning.
        resolution: side of the square pictures, in pixels.
        time_shift: pass it to ``training.samplers.times``.
        provenance: where the model comes from.
        unet: the diffusers module, in evaluation mode.
    """

    network: Network
    denoiser: Denoiser
    encoder: TextEncoder
    resolution: int
    time_shift: float
    provenance: Provenance
    unet: UNet2DConditionModel


def write_bundle(
    out: Path, *, unet: UNet2DConditionModel, encoder: TextEncoder, time_shift: float, provenance: Provenance
) -> Path:
    """Write a bundle; it appears complete or not at all, and replaces an older bundle of the same name.

    Args:
        out: the directory to make.
        unet: the network with the weights to publish (the moving average).
        encoder: the frozen text encoder; its weights travel along, so that a bundle stands alone.
        time_shift: the objective's shift of time.
        provenance: where the model comes from.

    Returns:
        ``out``.

    Raises:
        CheckpointError: ``out`` exists and is not a bundle.
    """
    if out.exists() and not (out / MANIFEST).is_file():
        raise CheckpointError(
            "The bundle cannot be written there.",
            value=str(out),
            rule=f"a new directory, or a bundle to replace (with {MANIFEST})",
            mend="choose another name or move what is there",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        fresh = aside / "new"
        _write_parts(fresh, unet, encoder, time_shift)
        manifest = BundleManifest(
            resolution=int(unet.config["sample_size"]),
            max_tokens=encoder.max_tokens,
            time_shift=time_shift,
            text_encoder_hash=encoder.hash,
            provenance=provenance,
            files=_records(fresh),
        )
        (fresh / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
        if out.exists():
            out.rename(aside / "old")
        fresh.rename(out)
    finally:
        shutil.rmtree(aside)
    return out


def _write_parts(folder: Path, unet: UNet2DConditionModel, encoder: TextEncoder, time_shift: float) -> None:
    """Everything that diffusers reads."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from transformers import AutoTokenizer

    from training import pipeline

    # a twin on the CPU, in float32 and plainly laid out: safetensors takes no channels-last weights
    twin = UNet2DConditionModel.from_config(unet.config)
    twin.load_state_dict(unet.state_dict())

    tokenizer = AutoTokenizer.from_pretrained(
        encoder.directory, model_max_length=encoder.max_tokens, local_files_only=True, trust_remote_code=False
    )
    pipeline.DarkroomPipeline(
        unet=twin,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=time_shift),
        text_encoder=encoder.model,
        tokenizer=tokenizer,
    ).save_pretrained(folder, safe_serialization=True)
    # the tokenizer stands beside the encoder too: the folder is then a transformers directory that a recipe may name
    tokenizer.save_pretrained(folder / "text_encoder")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["pipeline", pipeline.DarkroomPipeline.__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.copyfile(pipeline.__file__, folder / "pipeline.py")


def _records(folder: Path) -> dict[str, FileRecord]:
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


def verify_bundle(path: Path) -> BundleManifest:
    """Check every file of a bundle against its checksum.

    Raises:
        CheckpointError: a file is missing, has changed, or is named outside the bundle; the message names it.
    """
    manifest = read_manifest(path)
    for name, record in manifest.files.items():
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise CheckpointError(
                "The bundle names a file outside itself.", value=name, rule="paths inside the bundle", mend=_MEND
            )
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


def load_bundle(path: Path) -> LoadedBundle:
    """Verify a bundle and load it on the CPU in float32.

    Raises:
        CheckpointError: a file is missing, has changed or does not fit.
    """
    manifest = verify_bundle(path)
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from training.conditioning import TextEncoder
    from training.models import apply_unet
    from training.objectives import RectifiedFlow

    try:
        unet = UNet2DConditionModel.from_pretrained(path / "unet", use_safetensors=True, local_files_only=True)
        encoder = TextEncoder(path / "text_encoder", manifest.max_tokens)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError("The bundle's weights do not load.", value=str(path), rule=str(error)) from error
    unet.eval().requires_grad_(False)
    network: Network = partial(apply_unet, unet)
    return LoadedBundle(
        network=network,
        denoiser=RectifiedFlow(time_shift=manifest.time_shift).denoiser(network),
        encoder=encoder,
        resolution=manifest.resolution,
        time_shift=manifest.time_shift,
        provenance=manifest.provenance,
        unet=unet,
    )
