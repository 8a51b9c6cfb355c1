"""The bundle: what training hands to serving, a standard diffusers pipeline directory plus provenance.

bundle/
  model_index.json  pipeline.py      DiffusionPipeline.from_pretrained(bundle, trust_remote_code=True)
  unet/  text_encoder/               safetensors weights and their configs
  tokenizer/  scheduler/
  darkroom.json                      run, data, recipe, metrics, licences, and a checksum of every other file
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from training.bundle_manifest import (
    MANIFEST,
    BundleManifest,
    Provenance,
    manifest_sha256,
    read_manifest,
    records_of,
    verify_bundle,
)
from training.errors import CheckpointError

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from training.conditioning import TextEncoder
    from training.objectives import Denoiser, Network

__all__ = [
    "MANIFEST",
    "BundleManifest",
    "LoadedBundle",
    "Provenance",
    "load_bundle",
    "manifest_sha256",
    "read_manifest",
    "verify_bundle",
    "write_bundle",
]


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
        sha256: of the ``darkroom.json`` that stood there once everything was loaded.
    """

    network: Network
    denoiser: Denoiser
    encoder: TextEncoder
    resolution: int
    time_shift: float
    provenance: Provenance
    unet: UNet2DConditionModel
    sha256: str


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
            files=records_of(fresh),
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
        encoder.directory,
        model_max_length=encoder.max_tokens,
        padding_side="right",  # as training pads
        local_files_only=True,
        trust_remote_code=False,
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
        # last: a directory that was replaced meanwhile does not pass for the one that was verified
        sha256=manifest_sha256(path),
    )
