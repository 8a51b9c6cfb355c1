"""A fine-tuned network as a bundle: what the registry stores and serving loads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from training import models
from training.bundle import Provenance, load_bundle, write_bundle
from training.config import parse
from training.finetune.encoder import PipelineEncoder
from training.finetune.network import starting_network
from training.footprint import measure
from training.latents import canvas_of


@pytest.mark.parametrize("layout", ["sd", "sana"])
def test_a_bundle_of_a_pipeline_answers_as_the_trained_network(
    tiny: Callable[[str], Path], tmp_path: Path, layout: str
) -> None:
    import diffusers

    config = parse(
        {
            "data": {"path": "/data"},
            "start": {"pipeline": str(tiny(layout))},
            "model": {"resolution": 32},
            "adapter": {"rank": 2},
            "objective": {"caption_dropout": 0.2},
        }
    )
    encoder, canvas = PipelineEncoder(tiny(layout), 77), canvas_of(config)
    network = starting_network(config, encoder.shape, canvas.channels, canvas.factor).eval()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    provenance = Provenance(
        run_id="run",
        data_hash="data",
        use_digest="use",
        recipe=config.model_dump(mode="json"),
        metrics={},
        licences={},
        created_utc="2026-01-01T00:00:00+00:00",
        step=1,
        code_version="1",
    )
    objective = config.objective
    out = write_bundle(
        tmp_path / "bundle", network=network, encoder=encoder, objective=objective, canvas=canvas, provenance=provenance
    )
    bundle = load_bundle(out)
    assert bundle.encoder.hash == encoder.hash
    told, x, t = bundle.encoder.encode(["a cat"]), torch.randn(1, *bundle.canvas.shape), torch.tensor([0.5])
    with torch.no_grad():
        expected = objective.denoiser(partial(models.apply, network))(x, t, encoder.encode(["a cat"]))
        torch.testing.assert_close(bundle.denoiser(x, t, told), expected, rtol=1e-3, atol=1e-4)
    assert bundle.objective == objective
    pipe = diffusers.DiffusionPipeline.from_pretrained(out, local_files_only=True)
    assert type(pipe).__name__ == {"sd": "StableDiffusionPipeline", "sana": "SanaPipeline"}[layout]
    assert (out / "adapter" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_an_adapter_takes_is_known_without_its_weights(tiny: Callable[[str], Path], precision: str) -> None:
    values = {"data": {"path": "/data"}, "start": {"pipeline": str(tiny("sd"))}, "model": {"resolution": 32}}
    told = PipelineEncoder(tiny("sd"), 77).shape
    whole = measure(parse(values), told, precision)
    adapter = measure(parse({**values, "adapter": {"kind": "dora", "rank": 2}}), told, precision)
    assert whole.trained == whole.parameters
    assert 0 < adapter.trained < whole.trained / 10
    assert adapter.parameters == whole.parameters + adapter.trained
