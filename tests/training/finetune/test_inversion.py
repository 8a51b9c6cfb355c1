"""Textual inversion: a word is learnt, and whoever says it in another pipeline gets it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from training import checkpoint, models
from training.bundle import Provenance, load_bundle, write_bundle
from training.conditioning import Encoder, encoder_for
from training.config import TrainConfig, parse
from training.data.dataset import Dataset
from training.errors import ConfigError, UsageError
from training.finetune.inversion import FILE
from training.finetune.inversion_config import InvertedToken
from training.finetune.network import starting_network
from training.footprint import measure
from training.latents import canvas_of

TOKEN = "<thing>"
ADAPTER = {"kind": "textual_inversion", "token": TOKEN, "initial_token": "a", "vectors": 2}
Numbers = Callable[[TrainConfig], Encoder]


def recipe(pipeline: Path, **sections: Any) -> dict[str, Any]:
    start = {"data": {"path": "/data"}, "start": {"pipeline": str(pipeline)}, "model": {"resolution": 32}}
    return {**start, "adapter": ADAPTER, **sections}


@pytest.fixture
def numbers(tiny_data: Path) -> Numbers:
    """The encoder of a recipe."""
    return lambda config: encoder_for(config.conditioning, Dataset.open(tiny_data))


def test_a_caption_without_the_word_gets_it_and_every_word_stands_for_all_its_vectors() -> None:
    inverted = InvertedToken(token=TOKEN, vectors=3, template="{caption} in the style of {token}")
    assert inverted.in_caption("a cat") == "a cat in the style of <thing> <thing>_1 <thing>_2"
    assert inverted.in_caption("my <thing> here") == "my <thing> <thing>_1 <thing>_2 here"
    assert inverted.in_caption("") == ""


@pytest.mark.parametrize(
    ("layout", "adapter", "words"),
    [
        ("flux", ADAPTER, "CLIP alone reads it"),
        ("sd", {**ADAPTER, "template": "{caption}"}, "a template has {token}"),
        ("sd", {**ADAPTER, "token": "two words"}, "token"),
        ("sd", {"kind": "textual_inversion", "token": TOKEN}, "initial_token"),
    ],
)
def test_what_cannot_be_learnt_is_refused(
    tiny: Callable[[str], Path], layout: str, adapter: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(recipe(tiny(layout), adapter=adapter))
    assert words in str(caught.value)


def test_a_word_that_the_tokenizer_knows_is_refused(tiny: Callable[[str], Path], numbers: Numbers) -> None:
    with pytest.raises(ConfigError, match="knows the word already"):
        numbers(parse(recipe(tiny("sd"), adapter={**ADAPTER, "token": "a", "vectors": 1})))


@pytest.mark.parametrize("layout", ["sd", "sdxl"])
def test_what_was_learnt_is_told_alike_in_training_in_the_bundle_and_by_diffusers(
    tiny: Callable[[str], Path], numbers: Numbers, tmp_path: Path, layout: str
) -> None:
    import diffusers

    config = parse(recipe(tiny(layout)))
    encoder, canvas = numbers(config), canvas_of(config)
    network = starting_network(config, encoder.shape, canvas.channels, canvas.factor).eval()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            assert weight.requires_grad == name.endswith(".vectors"), name
            if weight.requires_grad:
                weight.normal_(generator=torch.Generator().manual_seed(0))
    x, t, caption = torch.randn(1, *canvas.shape), torch.tensor([0.5]), f"a {TOKEN} cat"
    with torch.no_grad():
        expected = config.objective.denoiser(partial(models.apply, network))(x, t, encoder.encode([caption]))
        told = network.told(encoder.encode([caption]))
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
    out = write_bundle(
        tmp_path / "bundle",
        network=network,
        encoder=encoder,
        objective=config.objective,
        canvas=canvas,
        provenance=provenance,
    )
    bundle = load_bundle(out)
    with torch.no_grad():
        found = bundle.denoiser(x, t, bundle.encoder.encode([caption]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(tiny(layout), local_files_only=True)
    learnt = load_file(out / "adapter" / FILE)
    if layout == "sd":
        assert set(learnt) == {TOKEN}
        pipe.load_textual_inversion(out / "adapter")
        tokens, _ = pipe.encode_prompt(caption, "cpu", 1, do_classifier_free_guidance=False)
        assert told.pooled is None
    else:
        for name, which in (("clip_l", ""), ("clip_g", "_2")):
            parts = {part: getattr(pipe, part + which) for part in ("text_encoder", "tokenizer")}
            pipe.load_textual_inversion(learnt[name], token=TOKEN, **parts)
        tokens, _, pooled, _ = pipe.encode_prompt(caption, device="cpu", do_classifier_free_guidance=False)
        torch.testing.assert_close(told.pooled, pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(told.tokens, tokens, rtol=1e-4, atol=1e-5)


def test_what_it_takes_is_known_without_weights(tiny: Callable[[str], Path], numbers: Numbers) -> None:
    config = parse(recipe(tiny("sd")))
    for precision in ("fp32", "bf16"):
        found = measure(config, numbers(config).shape, precision)
        assert 0 < found.trained < found.parameters / 100


def test_a_prompt_that_would_be_cut_is_refused(tiny: Callable[[str], Path], numbers: Numbers) -> None:
    encoder = numbers(parse(recipe(tiny("sd"))))
    encoder.check("a" * 10)
    with pytest.raises(UsageError, match="at most 77"):
        encoder.check(" ".join("a" * 80))


def test_a_run_learns_the_word_and_nothing_else(
    runs: Any, tiny: Callable[[str], Path], tmp_path: Path, numbers: Numbers
) -> None:
    start = {"start": {"pipeline": str(tiny("sd"))}, "adapter": ADAPTER}
    values = runs.config(steps=3, optimizer={"kind": "adamw", "learning_rate": 1e-2}, **start)
    values["model"] = {"resolution": 32}  # the tiny recipe describes a network
    (rank,) = runs.start(values, "run")
    assert rank.end() == 0, rank.told("error")
    found, _ = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    (learnt,) = found.load("weights").values()
    config = parse(values)
    canvas = canvas_of(config)
    (began,) = starting_network(config, numbers(config).shape, canvas.channels, canvas.factor).learnt
    assert learnt.shape == began.shape
    assert float((learnt - began).abs().max()) > 1e-3
