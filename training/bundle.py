"""The bundle: what training hands to serving, a standard diffusers pipeline directory plus provenance.

bundle/
  model_index.json  pipeline.py      DiffusionPipeline.from_pretrained(bundle, trust_remote_code=True)
  unet/ or transformer/              safetensors weights and their configs, as all that follows
  text_encoder/  tokenizer/          where the network is told captions
  vae/                               where it draws latents
  scheduler/
  darkroom.json                      run, data, recipe, metrics, licences, and a checksum of every other file
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.bundle_manifest import (
    MANIFEST,
    BundleManifest,
    Provenance,
    manifest_sha256,
    read_manifest,
    records_of,
    verify_bundle,
)
from training.bundle_told import told_by
from training.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

    from training.canvas import Canvas
    from training.conditioning import Encoder, TextEncoder
    from training.objectives import Denoiser, Network, Objective

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
        module: the diffusers model, in evaluation mode.
        objective: how it was trained; its ``grid`` is where samplers ask.
        encoder: captions or names of classes to conditioning.
        canvas: where the network draws: pixels, or the latents of the bundle's autoencoder.
        provenance: where the model comes from.
        sha256: of the ``darkroom.json`` that stood there once everything was loaded.
    """

    module: torch.nn.Module
    objective: Objective
    encoder: Encoder
    canvas: Canvas
    provenance: Provenance
    sha256: str

    @property
    def network(self) -> Network:
        """The raw network behind the network contract."""
        from training import models

        return partial(models.apply, self.module)

    @property
    def denoiser(self) -> Denoiser:
        """What samplers and the serving engine call."""
        return self.objective.denoiser(self.network)

    def on(self, device: torch.device | str) -> LoadedBundle:
        """The same bundle, its network and its autoencoder on a device."""
        return replace(self, module=self.module.to(device), canvas=self.canvas.on(device))


def write_bundle(
    out: Path, *, network: Any, encoder: Encoder, objective: Objective, canvas: Canvas, provenance: Provenance
) -> Path:
    """Write a bundle; it appears complete or not at all, and replaces an older bundle of the same name.

    Args:
        out: the directory to make.
        network: the diffusers model with the weights to publish (the moving average).
        encoder: of what the network is told; a frozen text encoder's weights travel along, so that a bundle stands
            alone.
        objective: how the network was trained.
        canvas: where it draws; an autoencoder travels along.
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
    from training.finetune.encoder import PipelineEncoder
    from training.finetune.inversion import write_words
    from training.finetune.inversion_tokens import TokenEncoder
    from training.finetune.output import write_pipeline

    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        fresh = aside / "new"
        folder = "transformer" if "Transformer" in type(network).__name__ else "unet"
        if isinstance(encoder, PipelineEncoder):
            write_pipeline(fresh, network, encoder.pipeline, objective)
        elif isinstance(encoder, TokenEncoder):
            write_pipeline(fresh, network.network, encoder.pipeline, objective)
            encoder = write_words(fresh, network, encoder)
        else:
            _write_parts(fresh, {folder: _plain(network)}, encoder, objective, canvas)
        manifest = BundleManifest.model_validate(
            {
                "network": folder,
                "objective": objective.model_dump(),
                "conditioning": told_by(encoder).model_dump(),
                "latents": canvas.autoencoder_at is not None,
                "resolution": canvas.resolution,
                "provenance": provenance.model_dump(),
                "files": records_of(fresh),
            }
        )
        (fresh / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
        if out.exists():
            out.rename(aside / "old")
        fresh.rename(out)
    finally:
        shutil.rmtree(aside)
    return out


def _plain(network: Any) -> Any:
    """A twin on the CPU, in float32 and plainly laid out: safetensors takes no channels-last weights."""
    twin = type(network).from_config(network.config)
    twin.load_state_dict(network.state_dict())
    return twin


def _write_parts(folder: Path, parts: dict[str, Any], encoder: Encoder, objective: Objective, canvas: Canvas) -> None:
    """Everything that diffusers reads."""
    from training import pipeline
    from training.conditioning import ClassEncoder, TextEncoder

    tokenizer = None
    if isinstance(encoder, TextEncoder):
        tokenizer = _tokenizer(encoder)
        parts = {**parts, "text_encoder": encoder.model, "tokenizer": tokenizer}
    if canvas.autoencoder is not None:
        parts = {**parts, "vae": canvas.autoencoder.model}
    classes = encoder.names if isinstance(encoder, ClassEncoder) else None
    pipe = pipeline.DarkroomPipeline(scheduler=objective.scheduler(), classes=classes, **parts)
    pipe.save_pretrained(folder, safe_serialization=True)
    if tokenizer is not None:
        # beside the encoder too: the folder is then a transformers directory that a recipe may name
        tokenizer.save_pretrained(folder / "text_encoder")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["pipeline", pipeline.DarkroomPipeline.__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.copyfile(pipeline.__file__, folder / "pipeline.py")


def _tokenizer(encoder: TextEncoder) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        encoder.directory,
        model_max_length=encoder.max_tokens,
        padding_side="right",  # as training pads
        local_files_only=True,
        trust_remote_code=False,
    )


def load_bundle(path: Path) -> LoadedBundle:
    """Verify a bundle and load it on the CPU in float32.

    Raises:
        CheckpointError: a file is missing, has changed or does not fit.
    """
    manifest = verify_bundle(path)
    from training import models
    from training.canvas import Canvas

    folder = path / manifest.network
    try:
        kind = models.network_class(json.loads((folder / "config.json").read_bytes())["_class_name"])
        module = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        encoder = manifest.conditioning.encoder(path)
        canvas = Canvas(manifest.resolution, path / "vae" if manifest.latents else None)
        canvas.load()
    except (OSError, ValueError, KeyError, RuntimeError, ConfigError) as error:
        raise CheckpointError("The bundle's weights do not load.", value=str(path), rule=str(error)) from error
    return LoadedBundle(
        module=module.eval().requires_grad_(False),
        objective=manifest.objective,
        encoder=encoder,
        canvas=canvas,
        provenance=manifest.provenance,
        # last: a directory that was replaced meanwhile does not pass for the one that was verified
        sha256=manifest_sha256(path),
    )
