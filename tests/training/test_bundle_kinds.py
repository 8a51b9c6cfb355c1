"""A bundle of every family, kind of conditioning and objective gives our sampler's pictures without Darkroom's code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from training import noise
from training.bundle import Provenance, load_bundle, write_bundle
from training.canvas import Canvas
from training.conditioning import ClassEncoder, Encoder, NoEncoder, TextConfig, TextEncoder
from training.errors import CheckpointError, UsageError
from training.models import DiTConfig, PixArtConfig, SD3Config, UNetConfig
from training.objectives import Edm, Epsilon, Objective, RectifiedFlow, VPrediction
from training.samplers import Guided, sample

PROVENANCE = Provenance(
    run_id="0", data_hash="d", recipe={}, created_utc="2026-01-01T00:00:00Z", step=1, code_version="c"
)
UNET = UNetConfig(resolution=16, widths=(8, 16), attention=(False, True), head_width=8, norm_groups=4)
SMALL: dict[str, Any] = {"resolution": 16, "layers": 2, "heads": 2, "head_width": 8}
KINDS: dict[str, tuple[Any, str, Objective, bool]] = {
    "a DiT of classes in latents": (DiTConfig(**SMALL), "class", RectifiedFlow(time_shift=2.0), True),
    "a DiT of nothing": (DiTConfig(**SMALL), "none", VPrediction(), False),
    "a UNet of classes": (UNET, "class", Epsilon(), False),
    "a UNet of nothing in latents": (UNET, "none", Edm(sigma_data=1.0), True),
    "a UNet of captions in latents": (UNET, "text", RectifiedFlow(), True),
    "an MM-DiT of captions": (SD3Config(**SMALL, max_patches=16), "text", RectifiedFlow(), True),
    "a PixArt of captions": (PixArtConfig(**SMALL), "text", VPrediction(), False),
}
PROMPTS = {"text": ["a robot face", "a sad cat"], "class": ["cat", "dog"], "none": ["", ""]}


def encoder_of(kind: str) -> Encoder:
    if kind == "text":
        return TextEncoder.from_config(TextConfig(max_tokens=12))
    return ClassEncoder(["bird", "cat", "dog"]) if kind == "class" else NoEncoder()


def drawn(network: torch.nn.Module) -> torch.nn.Module:
    """Weights that depend on no global generator and are nowhere zero."""
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.copy_(noise.normal(0, number, shape=tuple(parameter.shape)) * 0.15)
    return network


def pipeline_pictures(bundle: Path, prompts: Sequence[str], start: torch.Tensor, scale: float) -> torch.Tensor:
    pipe = DiffusionPipeline.from_pretrained(bundle, trust_remote_code=True, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 5, "latents": start, "output_type": "pt", "guidance_scale": scale}
    pictures: torch.Tensor = pipe(list(prompts), **options).images
    return pictures


@pytest.mark.parametrize("name", list(KINDS))
def test_it_gives_our_samplers_pictures(name: str, tmp_path: Path, autoencoder_directory: Path) -> None:
    config, kind, objective, latent = KINDS[name]
    encoder, canvas = encoder_of(kind), Canvas(16, autoencoder_directory if latent else None)
    network = drawn(config.build(encoder.shape, canvas.channels, canvas.factor))
    out = write_bundle(
        tmp_path / "bundle",
        network=network,
        encoder=encoder,
        objective=objective,
        canvas=canvas,
        provenance=PROVENANCE,
    )
    loaded = load_bundle(out)
    assert loaded.objective == objective
    assert loaded.encoder.shape == encoder.shape
    assert loaded.canvas.shape == canvas.shape
    prompts = PROMPTS[kind]
    start = torch.stack([noise.normal(seed, "test", shape=canvas.shape) for seed in (5, 6)])
    told, nothing = loaded.encoder.encode(prompts), loaded.encoder.encode(["", ""])
    guided = Guided(loaded.denoiser, nothing, torch.full((2,), 2.5))
    for denoiser, scale in ((guided, 2.5), (loaded.denoiser, 1.0)):
        ours = loaded.canvas.pictures(sample(denoiser, start, told, objective.grid(5))) / 2 + 0.5
        theirs = pipeline_pictures(out, prompts, start, scale)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
        assert ours.shape == (2, 3, 16, 16)
        assert ours.std() > 0.02, "the comparison is of pictures, not of constants"


def test_a_class_that_is_not_known_is_told_with_those_that_are(tmp_path: Path) -> None:
    encoder = ClassEncoder(["bird", "cat", "dog"])
    out = write_bundle(
        tmp_path / "bundle",
        network=DiTConfig(**SMALL).build(encoder.shape),
        encoder=encoder,
        objective=RectifiedFlow(),
        canvas=Canvas(16),
        provenance=PROVENANCE,
    )
    loaded = load_bundle(out).encoder
    loaded.check("cat")
    loaded.check("")
    with pytest.raises(UsageError) as caught:
        loaded.check("cats")
    text = str(caught.value)
    assert "This model knows no such class." in text
    assert "value:   'cats'" in text
    assert "options: cat, ..." in text
    with pytest.raises(ValueError, match="'cats' is no class of this model; it has 3: bird, cat, dog"):
        pipeline_pictures(out, ["cats"], torch.zeros(1, 3, 16, 16), 1.0)
    (out / "transformer" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"is missing.\n.*transformer/config.json"):
        load_bundle(out)
