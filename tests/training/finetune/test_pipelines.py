"""A pipeline's network, told and asked by us, is what diffusers' pipeline makes of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from training import models
from training.canvas import Canvas
from training.conditioning import Conditioning
from training.config import TrainConfig, parse
from training.finetune.encoder import PipelineEncoder
from training.finetune.layout import Pipeline
from training.finetune.network import starting_network
from training.latents import canvas_of

LAYOUTS = ("sd", "sd-v", "sdxl", "sd3", "sd3-two-encoders", "flux", "pixart", "sana")
TOKENS, PROMPT = 24, "a cat bag"


def layouts(*later: str) -> list[Any]:
    """Every layout; those that here do as another does, in a slow run."""
    return [pytest.param(each, marks=pytest.mark.slow) if each in later else each for each in LAYOUTS]


def recipe(pipeline: Path, **sections: Any) -> TrainConfig:
    values = {
        "data": {"path": "/data"},
        "start": {"pipeline": str(pipeline)},
        "model": {"resolution": 32},
        "conditioning": {"max_tokens": TOKENS},
    }
    return parse({**values, **sections})


def encoder_of(config: TrainConfig) -> PipelineEncoder:
    assert config.conditioning.kind == "pipeline"
    return PipelineEncoder(Path(config.conditioning.pipeline), config.conditioning.max_tokens)


def loaded(directory: Path) -> Any:
    """diffusers' pipeline; it wants to be told which encoders it does without."""
    import diffusers

    read = Pipeline.read(directory)
    absent = set(read.layout.encoders) - set(read.encoders)
    names = absent | {name.replace("text_encoder", "tokenizer") for name in absent}
    return diffusers.DiffusionPipeline.from_pretrained(directory, local_files_only=True, **dict.fromkeys(names))


class Watched:
    """A network's calls in a pipeline: what it got and what it gave."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.calls: list[tuple[dict[str, Any], torch.Tensor]] = []
        network.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, _: torch.nn.Module, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
        sample = output[0] if isinstance(output, tuple) else output.sample
        names = ("sample", "timestep")
        self.calls.append(({**dict(zip(names, args, strict=False)), **given}, sample))


def sampled(directory: Path, latents: torch.Tensor) -> tuple[Any, list[tuple[dict[str, Any], torch.Tensor]]]:
    """diffusers' pipeline, and the calls of its network in two steps from these latents, unguided."""
    pipe = loaded(directory)
    pipe.set_progress_bar_config(disable=True)
    kind = Pipeline.read(directory).kind
    watched = Watched(getattr(pipe, Pipeline.read(directory).layout.network[0]))
    options: dict[str, Any] = {"guidance_scale": 3.5 if kind == "flux" else 1.0}
    if kind in ("pixart", "sana"):
        options |= {"use_resolution_binning": False, "clean_caption": False}
    if kind not in ("sd", "sdxl"):
        options["max_sequence_length"] = TOKENS
    given = latents
    if kind == "flux":
        given = pipe._pack_latents(latents, 1, latents.shape[1], *latents.shape[2:])
    pipe(PROMPT, num_inference_steps=2, height=32, width=32, output_type="latent", latents=given.clone(), **options)
    return pipe, watched.calls


@pytest.mark.parametrize("layout", layouts("sd3-two-encoders"))
def test_each_step_asks_the_network_as_the_pipeline_does(tiny: Callable[[str], Path], layout: str) -> None:
    config = recipe(tiny(layout))
    canvas, encoder = canvas_of(config), encoder_of(config)
    noise = torch.randn(1, *canvas.shape, generator=torch.Generator().manual_seed(1))
    pipe, calls = sampled(tiny(layout), noise)
    network = starting_network(config, encoder.shape, canvas.channels, canvas.factor).eval()
    told = encoder.encode([PROMPT])
    kind = Pipeline.read(tiny(layout)).kind
    flow = config.objective.kind == "rectified_flow"
    denoiser = config.objective.denoiser(partial(models.apply, network))
    assert len(calls) == 2
    for given, told_output in calls:
        x = given.get("sample", given.get("hidden_states"))
        step = float(torch.as_tensor(given["timestep"]).flatten()[0]) * (1000 if kind == "flux" else 1)
        output = told_output
        if kind == "flux":
            x, output = (pipe._unpack_latents(each, 32, 32, 8) for each in (x, told_output))
        output = output[:, : x.shape[1]]
        t = torch.tensor([step / 1000])
        with torch.no_grad():
            ours = models.apply(network, x, t, told)
            clean = denoiser(x, t if flow else (torch.tensor([step]) + 1) / 1000, told)
        torch.testing.assert_close(ours, output, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(clean, clean_by_diffusers(pipe, x, step, output), rtol=2e-3, atol=2e-3)


def clean_by_diffusers(pipe: Any, x: torch.Tensor, step: float, output: torch.Tensor) -> torch.Tensor:
    """What the pipeline's scheduler takes the clean latents for."""
    if hasattr(pipe.scheduler, "alphas_cumprod") and not pipe.scheduler.config.get("use_flow_sigmas"):
        found: torch.Tensor = pipe.scheduler.step(output, int(step), x).pred_original_sample
        return found
    return x - step / 1000 * output


@pytest.mark.parametrize("layout", layouts("sd-v"))
def test_captions_become_what_encode_prompt_makes_of_them(tiny: Callable[[str], Path], layout: str) -> None:
    pipe = loaded(tiny(layout))
    encoder = encoder_of(recipe(tiny(layout)))
    ours = encoder.encode([PROMPT, ""])
    theirs = pipe.encode_prompt(**_asked(layout, PROMPT))
    tokens, pooled, mask = _told(layout, theirs)
    assert (ours.tokens.shape[1:], ours.mask.shape[1]) == (
        (encoder.shape.tokens, encoder.shape.width),
        encoder.shape.tokens,
    )
    torch.testing.assert_close(ours.rows([0]).tokens[ours.mask[:1]], tokens[mask.bool()])
    assert torch.equal(ours.mask[:1], mask.bool())
    if pooled is None:
        assert ours.pooled is None
    else:
        assert ours.pooled is not None
        assert ours.pooled.shape[1] == encoder.shape.pooled
        torch.testing.assert_close(ours.pooled[:1], pooled)


def _asked(layout: str, prompt: str) -> dict[str, Any]:
    options: dict[str, Any] = {"prompt": prompt, "device": "cpu"}
    if layout.startswith(("sd3", "flux")):
        options |= {"prompt_2": None, "max_sequence_length": TOKENS}
    if layout.startswith("sd3"):
        options["prompt_3"] = None
    if layout in ("pixart", "sana"):
        options["max_sequence_length"] = TOKENS
    if layout == "sana":
        from inspect import signature

        from diffusers import SanaPipeline

        given = signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
        options["complex_human_instruction"] = given
    if layout != "flux":
        options["do_classifier_free_guidance"] = False
    if layout in ("sd", "sd-v"):
        options["num_images_per_prompt"] = 1
    return options


def _told(layout: str, found: Any) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Tokens, pooled state and mask."""
    tokens = found[0]
    every = torch.ones(tokens.shape[:2])
    if layout in ("pixart", "sana"):
        return tokens, None, found[1]
    if layout in ("sd", "sd-v"):
        return tokens, None, every
    return tokens, found[1] if layout == "flux" else found[2], every


def test_the_empty_caption_of_sdxl_is_nothing_as_in_its_pipeline(tiny: Callable[[str], Path]) -> None:
    row = encoder_of(recipe(tiny("sdxl"))).encode([""])
    assert row.pooled is not None
    assert not row.tokens.any()
    assert not row.pooled.any()


def test_sanas_empty_caption_is_its_pipelines_negative_prompt(tiny: Callable[[str], Path]) -> None:
    pipe = loaded(tiny("sana"))
    _, _, tokens, mask = pipe.encode_prompt([""], device="cpu", max_sequence_length=TOKENS)
    ours = encoder_of(recipe(tiny("sana"))).encode([""])
    assert torch.equal(ours.mask, mask.bool())
    torch.testing.assert_close(ours.tokens[ours.mask], tokens[mask.bool()])


@pytest.mark.parametrize("layout", ["sd", "sana"])
def test_pictures_go_through_the_pipelines_own_autoencoder(tiny: Callable[[str], Path], layout: str) -> None:
    pipe = loaded(tiny(layout))
    canvas: Canvas = canvas_of(recipe(tiny(layout)))
    pictures = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours = canvas.clean(pictures)
    with torch.no_grad():
        encoded = pipe.vae.encode(pictures)
        latents = encoded.latent if layout == "sana" else encoded.latent_dist.mode()
        theirs = latents * pipe.vae.config.scaling_factor
        again = pipe.vae.decode(theirs / pipe.vae.config.scaling_factor).sample.clamp(-1, 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(canvas.pictures(ours), again, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", layouts("sd-v", "sd3-two-encoders"))
def test_the_objective_reaches_every_weight(tiny: Callable[[str], Path], layout: str) -> None:
    config = recipe(tiny(layout))
    canvas, encoder = canvas_of(config), encoder_of(config)
    network = starting_network(config, encoder.shape, canvas.channels, canvas.factor)
    told: Conditioning = encoder.encode([PROMPT, ""])
    draws = config.objective.draw(0, [0, 0], [1, 2], canvas.shape)
    loss = config.objective.loss(partial(models.apply, network), torch.randn(2, *canvas.shape), told, draws)
    loss.mean().backward()
    assert loss.isfinite().all()
    assert all(parameter.grad is not None for parameter in network.parameters() if parameter.requires_grad)
