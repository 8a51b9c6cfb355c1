"""A bundle of every objective: diffusers' pipeline with its scheduler makes the pictures that our sampler makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from training import noise
from training.bundle import Provenance, load_bundle, write_bundle
from training.canvas import Canvas
from training.conditioning import TextConfig, TextEncoder
from training.models import UNetConfig
from training.objectives import CosineNoise, Edm, Epsilon, LinearNoise, ObjectiveConfig, VPrediction
from training.samplers import Guided, sample

PROVENANCE = Provenance(
    run_id="0", data_hash="0" * 64, recipe={}, created_utc="2026-01-01T00:00:00+00:00", step=1, code_version="unknown"
)
KINDS: dict[str, ObjectiveConfig] = {
    "v": VPrediction(noise_schedule=CosineNoise(shift=1.5)),
    "epsilon": Epsilon(noise_schedule=LinearNoise(kind="scaled_linear", beta_start=0.00085, beta_end=0.012)),
    "edm": Edm(),
}


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.from_config(TextConfig(max_tokens=12))


@pytest.fixture(scope="module")
def network(encoder: TextEncoder) -> Any:
    config = UNetConfig(resolution=8, widths=(8, 16), attention=(False, True), head_width=8, norm_groups=4)
    unet = config.build(encoder.shape)
    with torch.no_grad():
        for number, parameter in enumerate(unet.parameters()):
            parameter.copy_(noise.normal(0, number, shape=tuple(parameter.shape)) * 0.1)
    return unet


@pytest.mark.parametrize("name", KINDS)
def test_the_pipeline_of_a_bundle_makes_our_samplers_pictures(
    name: str, network: Any, encoder: TextEncoder, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    objective = KINDS[name]
    out = write_bundle(
        tmp_path / name,
        network=network,
        encoder=encoder,
        objective=objective,
        canvas=Canvas(8),
        provenance=PROVENANCE,
    )
    loaded = load_bundle(out)
    assert loaded.objective == objective
    start = torch.stack([noise.normal(seed, "test", shape=(3, 8, 8)) for seed in (5, 6)])
    pipe = DiffusionPipeline.from_pretrained(out, trust_remote_code=True, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    told, negative = encoder.encode(["a robot face", "a sad cat"]), encoder.encode(["", ""])
    denoiser = objective.denoiser(loaded.network)
    for steps, scale in ((7, 1.0), (15, 2.5)):
        theirs = pipe(
            ["a robot face", "a sad cat"],
            num_inference_steps=steps,
            guidance_scale=scale,
            latents=start,
            output_type="pt",
        ).images
        used = denoiser if scale == 1 else Guided(denoiser, negative, torch.full((2,), scale))
        ours = sample(used, start, told, objective.grid(steps)).clamp(-1, 1) / 2 + 0.5
        assert float((ours - (start.clamp(-1, 1) / 2 + 0.5)).abs().mean()) > 0.02, "something happened"
        assert torch.allclose(ours, theirs, atol=2e-3)
