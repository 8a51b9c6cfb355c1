"""Checks of prompts and pictures, and their refusals in each dialect's own shape."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from PIL import Image

from serving.app import create_app
from serving.config import BatchConfig, LimitConfig
from serving.engine import Engine
from serving.model import ModelCard
from serving.safety import Finding, Safety, SafetyError
from serving.safety_checks import load_safety
from serving.safety_config import NoCheck, OpenNsfwCheck, SafetyConfig
from tests.serving.live_server import serving
from training.canvas import Canvas
from training.errors import ConfigError
from training.objectives import Denoiser

CARD = ModelCard("tiny", 3, resolution=8, created=1_700_000_000, bundle_sha256="b" * 64)
LIMITS = LimitConfig(default_steps=4, max_images_per_request=2)


def checks(**config: Any) -> Safety:
    return load_safety(SafetyConfig.model_validate({"images": {"kind": "none"}, **config}))


@pytest.fixture(scope="module")
def engine(denoiser: Denoiser, encoder: Any) -> Engine:
    config = BatchConfig(padded_rows=2, max_batch_rows=4, max_waiting_images=4)
    return Engine(denoiser, encoder, canvas=Canvas(8), config=config)


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    """Refuses a word in prompts, and pictures that are mostly red: as real as a rule on eight pixels can be."""

    def too_red(image: Image.Image) -> Finding | None:
        red, green, _ = image.resize((1, 1)).getpixel((0, 0))  # type: ignore[misc]
        return Finding("less red", red / 255) if red > green else None

    words = checks(prompts={"kind": "words", "words": ["bad thing"]})
    with serving(create_app(engine, CARD, LIMITS, safety=Safety(words.prompts, too_red))) as port:
        yield f"http://127.0.0.1:{port}"


def seeds(url: str) -> tuple[int, int]:
    """A seed whose picture is allowed, and one whose is not."""
    allowed: dict[bool, int] = {}
    for seed in range(64):
        answer = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a", "seed": seed}, timeout=60)
        allowed.setdefault(answer.status_code == 200, seed)
        if len(allowed) == 2:
            break
    return allowed[True], allowed[False]


def test_openais_client_gets_its_own_error(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(prompt="A BAD   thing!")
        assert (caught.value.code, caught.value.param) == ("content_policy_violation", "prompt")
        assert "none of the 1 words that this server's operator lists" in caught.value.message
        assert "bad thing" not in caught.value.message.lower()
        fine, refused = seeds(url)
        assert client.images.generate(prompt="a", extra_body={"seed": fine}).data
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(prompt="a", extra_body={"seed": refused})
        assert caught.value.code == "content_policy_violation"
        assert "less red" in caught.value.message
        with pytest.raises(openai.APIError, match="not allowed"):
            list(client.images.generate(prompt="a", stream=True, partial_images=2, extra_body={"seed": refused}))


def test_a1111s_client_gets_its_own_error(url: str) -> None:
    answer = httpx.post(f"{url}/sdapi/v1/txt2img", json={"prompt": "bad thing"})
    assert answer.status_code == 400
    body = answer.json()
    assert (body["error"], body["body"]) == ("content_policy_violation", "prompt")
    assert "not allowed" in body["errors"] == body["detail"]


def test_a_refused_picture_frees_its_place_and_shows_no_preview(url: str, engine: Engine) -> None:
    _, refused = seeds(url)
    for _ in range(4):
        with httpx.stream(
            "POST",
            f"{url}/v1/images/generations",
            json={"prompt": "a", "seed": refused, "stream": True, "partial_images": 3},
        ) as answer:
            events = [line for line in answer.iter_lines() if line.startswith("data: ")]
        for event in events[:-1]:
            shown = json.loads(event.removeprefix("data: "))
            image = Image.open(io.BytesIO(base64.b64decode(shown["b64_json"])))
            red, green, _ = image.resize((1, 1)).getpixel((0, 0))  # type: ignore[misc]
            assert red <= green
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "content_policy_violation"
    assert engine.waiting_images == 0


@pytest.mark.parametrize("prompt", ["a bad thing", "BAD THING", "\uff42\uff41\uff44 thing", "bad-thing", "bad\nthing."])
def test_listed_words_are_found_however_they_are_written(prompt: str) -> None:
    safety = checks(prompts={"kind": "words", "words": ["Bad Thing", "x.y"]})
    with pytest.raises(SafetyError):
        safety.check_prompt(prompt)


@pytest.mark.parametrize("prompt", ["a badthing", "bad things", "bad", "", "xzy", "thing bad"])
def test_other_words_are_not(prompt: str) -> None:
    checks(prompts={"kind": "words", "words": ["Bad Thing", "x.y"]}).check_prompt(prompt)


def test_the_packaged_classifier_is_the_default() -> None:
    config = SafetyConfig()
    assert isinstance(config.images, OpenNsfwCheck)
    assert isinstance(config.prompts, NoCheck)
    safety = load_safety(config)
    assert safety.allows(Image.effect_noise((64, 64), 50).convert("RGB"))
    # skin all over is what it was taught: a flat patch of it scores above 0.2
    strict = load_safety(SafetyConfig(images=OpenNsfwCheck(threshold=0.15)))
    with pytest.raises(SafetyError) as caught:
        strict.check_picture(Image.new("RGB", (64, 64), (224, 172, 140)))
    assert "rule:    an Open-NSFW score under 0.15" in str(caught.value)
    assert "value:   0." in str(caught.value)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture classifier of random weights that always says ``unsafe``."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("classifier")
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    config.id2label, config.label2id = {0: "safe", 1: "unsafe"}, {"safe": 0, "unsafe": 1}
    model = ViTForImageClassification(config)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([-9.0, 9.0]))
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def test_a_classifier_in_a_directory(classifier: Path) -> None:
    image = Image.new("RGB", (32, 20))
    assert not checks(images={"kind": "directory", "directory": str(classifier), "labels": ["unsafe"]}).allows(image)
    assert checks(images={"kind": "directory", "directory": str(classifier), "labels": ["safe"]}).allows(image)
    with pytest.raises(ConfigError, match="does not have these labels") as caught:
        checks(images={"kind": "directory", "directory": str(classifier), "labels": ["nude"]})
    assert "options: safe, unsafe" in str(caught.value)


def test_weights_that_would_be_unpickled_are_none(classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((classifier / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ConfigError, match="cannot be loaded") as caught:
        checks(images={"kind": "directory", "directory": str(tmp_path), "labels": ["unsafe"]})
    assert r"no *.safetensors in it" in str(caught.value)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        checks(images={"kind": "directory", "directory": str(tmp_path), "labels": ["unsafe"]})


def test_diffusers_checker_in_a_directory(tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessorPil

    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "projection_dim": 8,
    }
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    image = Image.effect_noise((16, 16), 80).convert("RGB")
    for threshold, allowed in ((2.0, True), (-2.0, False)):  # of cosines: never reached, and always
        checker.concept_embeds_weights.data.fill_(threshold)
        checker.special_care_embeds_weights.data.fill_(2.0)
        checker.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        assert checks(images={"kind": "directory", "directory": str(tmp_path)}).allows(image) is allowed
