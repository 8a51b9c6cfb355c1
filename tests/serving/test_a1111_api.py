"""The A1111 dialect over a real socket, read by an unmodified client of that UI."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import webuiapi
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from serving.a1111_making import to_request
from serving.a1111_schemas import TextToImage
from serving.app import create_app
from serving.config import BatchConfig, LimitConfig
from serving.engine import Engine
from serving.infotext import from_infotext, to_infotext
from serving.model import ModelCard
from tests.serving.live_server import serving, until
from training.canvas import Canvas
from training.objectives import Denoiser

CARD = ModelCard("tiny", 3, resolution=8, created=1_700_000_000, bundle_sha256="b" * 64)


@pytest.fixture(scope="module")
def engine(denoiser: Denoiser, encoder: Any) -> Engine:
    batch = BatchConfig(padded_rows=2, max_batch_rows=4, max_waiting_images=4)
    return Engine(denoiser, encoder, canvas=Canvas(8), config=batch)


@pytest.fixture(scope="module")
def port(engine: Engine) -> Iterator[int]:
    limits = LimitConfig(max_steps=1_000_000, default_steps=4, max_images_per_request=4)
    with serving(create_app(engine, CARD, limits)) as port:
        yield port


@pytest.fixture
def api(port: int) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(host="127.0.0.1", port=port, sampler="Euler", steps=4)


def post(port: int, route: str, **body: Any) -> httpx.Response:
    content = json.dumps(body)  # httpx cannot send half a character
    headers = {"content-type": "application/json"}
    return httpx.post(f"http://127.0.0.1:{port}/sdapi/v1/{route}", content=content, headers=headers, timeout=60)


def ramp() -> Image.Image:
    level = np.tile(np.linspace(0, 255, 8, dtype=np.uint8), (8, 1))
    return Image.fromarray(np.stack([level, level.T, level // 2], -1))


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def test_txt2img_makes_pictures_with_seeds_that_count_on(api: webuiapi.WebUIApi) -> None:
    several = api.txt2img(prompt="a red circle", seed=5, batch_size=2, n_iter=2, width=8, height=8, cfg_scale=2)
    assert len(several.images) == 4
    assert several.info["all_seeds"] == [5, 6, 7, 8]
    one = api.txt2img(prompt="a red circle", seed=6, width=8, height=8, cfg_scale=2)
    assert np.array_equal(array(one.image), array(several.images[1]))
    assert "tiling" in several.info["ignored"], "what is not obeyed is said"
    drawn = api.txt2img(prompt="a red circle", width=8, height=8)
    again = api.txt2img(prompt="a red circle", width=8, height=8, seed=drawn.info["seed"])
    assert np.array_equal(array(drawn.image), array(again.image))


def test_both_dialects_make_the_same_picture(api: webuiapi.WebUIApi, port: int) -> None:
    ours = api.txt2img(prompt="a cat", seed=3, steps=5, cfg_scale=2.5, width=8, height=8, sampler_name="DPM++ 2M")
    body = {"prompt": "a cat", "seed": 3, "num_inference_steps": 5, "guidance_scale": 2.5, "sampler": "dpmpp_2m"}
    other = httpx.post(f"http://127.0.0.1:{port}/v1/images/generations", json=body, timeout=60).json()["data"][0][
        "b64_json"
    ]
    theirs = Image.open(io.BytesIO(base64.b64decode(other)))
    assert np.array_equal(array(ours.image), array(theirs))
    assert ours.image.info["parameters"] == theirs.info["parameters"]


def test_a_picture_tells_its_parameters_to_the_uis_tools(api: webuiapi.WebUIApi) -> None:
    made = api.txt2img(prompt="a cat, 3D", negative_prompt="blue", seed=3, cfg_scale=2.5, width=8, height=8)
    text = (
        "a cat, 3D\nNegative prompt: blue\nSteps: 4, Sampler: Euler, CFG scale: 2.5, Seed: 3, Size: 8x8, "
        "Model hash: bbbbbbbbbb, Model: tiny/3"
    )
    assert made.image.info["parameters"] == text
    assert made.info["infotexts"] == [text]
    told = api.png_info(made.image)
    assert told.info == text
    assert told.parameters["Seed"] == "3"
    assert told.parameters["Prompt"] == "a cat, 3D"


def test_img2img_keeps_what_the_mask_keeps(api: webuiapi.WebUIApi) -> None:
    mask = Image.new("L", (8, 8))
    mask.paste(255, (4, 0, 8, 8))
    fields = {"prompt": "a cat", "seed": 1, "width": 8, "height": 8, "cfg_scale": 2.0}
    half = api.img2img(images=[ramp()], mask_image=mask, inpainting_mask_invert=0, denoising_strength=1.0, **fields)
    assert np.array_equal(array(half.image)[:, :4], array(ramp())[:, :4])
    assert np.abs(array(half.image)[:, 4:] - array(ramp())[:, 4:]).mean() > 5
    turned = api.img2img(images=[ramp()], mask_image=mask, inpainting_mask_invert=1, denoising_strength=1.0, **fields)
    assert np.array_equal(array(turned.image)[:, 4:], array(ramp())[:, 4:])
    near = api.img2img(images=[ramp()], denoising_strength=0.25, **fields)
    far = api.img2img(images=[ramp()], denoising_strength=1.0, **fields)
    assert np.abs(array(near.image) - array(ramp())).mean() < np.abs(array(far.image) - array(ramp())).mean()


def test_the_server_says_what_it_has(api: webuiapi.WebUIApi) -> None:
    assert [sampler["name"] for sampler in api.get_samplers()] == ["Euler", "Heun", "DPM++ 2M", "Euler a", "LCM"]
    assert [model["model_name"] for model in api.get_sd_models()] == ["tiny/3"]
    assert api.get_options()["sd_model_checkpoint"] == "tiny/3"
    assert api.get_upscalers() == api.get_loras() == api.get_sd_vae() == []
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    api.set_options({"sd_model_checkpoint": "tiny/3 [bbbbbbbbbb]"})


def test_progress_shows_a_preview_and_an_interruption_gives_what_is_there(
    api: webuiapi.WebUIApi, port: int, engine: Engine
) -> None:
    idle = api.get_progress()
    assert (idle["progress"], idle["state"]["job_count"]) == (0.0, 0)
    answers: list[httpx.Response] = []
    long = {"prompt": "long", "steps": 4000, "cfg_scale": 1.0, "n_iter": 1}
    thread = threading.Thread(target=lambda: answers.append(post(port, "txt2img", **long)))
    thread.start()
    until(lambda: api.get_progress()["current_image"])
    seen = api.get_progress()
    assert 0 < seen["progress"] < 1
    assert seen["eta_relative"] > 0
    assert seen["state"]["sampling_steps"] == 4000
    assert Image.open(io.BytesIO(base64.b64decode(seen["current_image"]))).size == (8, 8)
    api.interrupt()
    thread.join(20)
    assert answers[0].status_code == 200
    assert answers[0].json()["images"] == []
    until(lambda: engine.running_images == 0)


BAD = [
    ("txt2img", {"width": 512}, "8x8 pixels", "512x8", "a size that the model was trained at"),
    ("txt2img", {"steps": 1_000_001}, "'steps'", "1000001", "at most 1000000"),
    ("txt2img", {"batch_size": 3, "n_iter": 2}, "'batch_size'", "6", "at most 4"),
    ("txt2img", {"cfg_scale": 99}, "'cfg_scale'", "99", "at most 20"),
    ("txt2img", {"sampler_name": "PLMS"}, "'sampler_name'", "PLMS", "Euler, Heun, DPM++ 2M, Euler a, LCM"),
    ("txt2img", {"enable_hr": True}, "'enable_hr'", "True", "nothing of the kind"),
    ("txt2img", {"script_name": "x/y/z plot"}, "'script_name'", "x/y/z plot", "nothing of the kind"),
    ("txt2img", {"sampler_name": "\ud800"}, "'sampler_name'", "ud800", "whole Unicode characters"),
    ("txt2img", {"seed": 2**53}, "'seed'", str(2**53), f"at most {2**53 - 1}"),
    ("txt2img", {"seed": 2**53 - 1, "n_iter": 2}, "'seed'", str(2**53 - 1), f"at most {2**53 - 2}"),
    ("options", {"\ud800": "\ud800"}, "ud800", "ud800", "sd_model_checkpoint"),
    ("txt2img", {"steps": "many"}, "'steps'", "many", "valid integer"),
    ("img2img", {}, "'init_images'", "", "Missing required parameter"),
    ("img2img", {"init_images": ["!"]}, "'init_images'", "1 characters", "base64"),
    ("img2img", {"init_images": ["aGVsbG8="]}, "'init_images'", "no picture", "a PNG, JPEG"),
    ("png-info", {"image": "aGVsbG8="}, "'image'", "no picture", "a PNG, JPEG"),
    ("options", {"sd_vae": "x"}, "sd_vae", "'x'", "sd_model_checkpoint: tiny, tiny/3"),
]


@pytest.mark.parametrize(("route", "body", "field", "value", "rule"), BAD)
def test_bad_requests_are_refused_in_the_dialects_own_shape(
    port: int, route: str, body: dict[str, Any], field: str, value: str, rule: str
) -> None:
    answer = post(port, route, **body)
    assert answer.status_code == 400
    said = answer.json()
    assert set(said) == {"error", "detail", "errors", "body"}
    for text in (field, value, rule):
        assert text in said["detail"]


def test_an_unknown_route_is_refused_in_the_dialects_shape(port: int) -> None:
    answer = httpx.get(f"http://127.0.0.1:{port}/sdapi/v1/nothing")
    assert (answer.status_code, answer.json()["error"]) == (404, "unknown_url")


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30).map(str.strip)


@given(TEXT.filter(lambda text: "Negative prompt" not in text), TEXT.filter(bool), st.integers(0, 2**53))
def test_the_text_of_a_picture_reads_back(prompt: str, model: str, seed: int) -> None:
    parameters = {
        "prompt": prompt,
        "steps": 4,
        "sampler": "euler",
        "guidance_scale": 2.5,
        "seed": seed,
        "width": 8,
        "height": 8,
        "bundle_sha256": "b" * 64,
    }
    found = from_infotext(to_infotext({**parameters, "model": model, "negative_prompt": "blue, green"}))
    assert (found["Prompt"], found["Negative prompt"]) == (prompt, "blue, green")
    assert (found["Model"], found["Seed"], found["Sampler"]) == (model, str(seed), "Euler")
    assert json.dumps(found)


def test_null_means_the_default(port: int) -> None:
    fields = ("prompt", "negative_prompt", "seed", "cfg_scale", "sampler_name", "width", "batch_size", "n_iter")
    more = ("send_images", "enable_hr", "script_name", "styles", "override_settings", "alwayson_scripts")
    answer = post(port, "txt2img", steps=2, **dict.fromkeys([*fields, *more]))
    assert answer.status_code == 200
    assert json.loads(answer.json()["info"])["ignored"] == []
    assert answer.json()["parameters"]["cfg_scale"] == 7


def test_the_uis_own_defaults_give_way_to_the_limits() -> None:
    limits = LimitConfig(max_steps=10, default_steps=4, max_guidance_scale=5)
    wanted = to_request(TextToImage(), CARD, limits)
    assert (wanted.steps, wanted.guidance_scale) == (10, 5)


@pytest.mark.parametrize("value", ["\ud800", float("nan"), {"deep": [None, "\ud800"]}])
def test_what_is_ignored_cannot_break_the_answer(port: int, value: Any) -> None:
    answer = post(port, "txt2img", steps=2, unheard_of=value)
    assert answer.status_code == 200
    assert json.loads(answer.json()["info"])["ignored"] == ["unheard_of"]
    assert "unheard_of" not in answer.json()["parameters"]
    deep = b'{"steps": 2, "unheard_of": ' + b"[" * 400 + b"]" * 400 + b"}"
    headers = {"content-type": "application/json"}
    place = f"http://127.0.0.1:{port}/sdapi/v1/txt2img"
    assert httpx.post(place, content=deep, headers=headers).status_code == 200


def test_a_picture_in_lines_of_base64_and_an_empty_mask_are_taken(port: int) -> None:
    buffer = io.BytesIO()
    ramp().save(buffer, "PNG")
    lines = base64.encodebytes(buffer.getvalue()).decode()
    assert "\n" in lines
    answer = post(port, "img2img", steps=2, init_images=[f"data:image/png;base64,{lines}"], mask="")
    assert answer.status_code == 200
    assert len(answer.json()["images"]) == 1


@pytest.mark.parametrize("text", ["a" * 1_000_000, "a" + " " * 1_000_000 + "b", 'a: "' * 200_000, 'a: "\\' * 200_000])
def test_a_strangers_text_is_read_in_a_time_that_grows_with_its_length(text: str) -> None:
    assert len(from_infotext(text)) >= 2


def test_backslashes_read_back() -> None:
    parameters = {
        "prompt": "a",
        "steps": 4,
        "sampler": "euler",
        "guidance_scale": 2.5,
        "seed": 1,
        "width": 8,
        "height": 8,
        "bundle_sha256": "b" * 64,
    }
    for model in ("a\\nb, c", "\\", 'x: "\\"'):
        assert from_infotext(to_infotext({**parameters, "model": model}))["Model"] == model
