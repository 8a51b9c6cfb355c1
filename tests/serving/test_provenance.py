"""What a picture says of itself, in every format, and what ``/v1/provenance/verify`` makes of strangers' pictures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from serving.app import create_app
from serving.config import BatchConfig, LimitConfig
from serving.engine import Engine
from serving.images import Words, encode_image, read_words
from serving.infotext import from_infotext
from serving.model import ModelCard
from serving.parameters import Parameters, software
from serving.provenance_certificate import make_trial_pair
from serving.provenance_config import CredentialsConfig, ProvenanceConfig
from serving.uploads import MAX_UPLOAD_PIXELS, checked_header
from serving.watermark import embed
from tests.serving.live_server import serving
from training.canvas import Canvas
from training.objectives import Denoiser

CARD = ModelCard("tiny", 3, resolution=8, created=1_700_000_000, bundle_sha256="b" * 64, run_id="run", data_hash="data")
LIMITS = LimitConfig(default_steps=2, max_images_per_request=2)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_trial_pair(tmp_path_factory.mktemp("trial"))


@pytest.fixture(scope="module")
def url(denoiser: Denoiser, encoder: Any, pair: tuple[Path, Path, Path]) -> Iterator[str]:
    config = BatchConfig(padded_rows=2, max_batch_rows=4, max_waiting_images=4)
    engine = Engine(denoiser, encoder, canvas=Canvas(8), config=config)
    signing = CredentialsConfig(certificate=str(pair[0]), key=str(pair[1]))
    provenance = ProvenanceConfig(credentials=signing, trust_anchors=str(pair[2]))
    with serving(create_app(engine, CARD, LIMITS, provenance=provenance)) as port:
        yield f"http://127.0.0.1:{port}"


def made(url: str, **fields: Any) -> bytes:
    body = {"prompt": "a red circle", "seed": 4, "num_inference_steps": 2, **fields}
    answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def verified(url: str, file: bytes) -> dict[str, Any]:
    answer = httpx.post(f"{url}/v1/provenance/verify", files={"image": file}, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
def test_every_format_carries_all_that_makes_the_picture_again(url: str, output_format: str) -> None:
    header = Image.open(io.BytesIO(made(url, output_format=output_format, negative_prompt="blau, grün")))
    assert header.format == output_format.upper()
    words = read_words(header)
    assert json.loads(words.json) == {
        "model": "tiny/3",
        "bundle_sha256": "b" * 64,
        "run_id": "run",
        "data_hash": "data",
        "prompt": "a red circle",
        "negative_prompt": "blau, grün",
        "seed": 4,
        "steps": 2,
        "guidance_scale": 3.0,
        "sampler": "euler",
        "width": 8,
        "height": 8,
        "execution": {
            "padded_rows": 2,
            "precision": "float32",
            "compiled": False,
            "step_cache": 0.0,
            "device": "cpu",
            "threads": 1,
        },
        "software": software(),
        "output_format": output_format,
    }
    told = from_infotext(words.infotext)
    assert (told["Negative prompt"], told["Seed"], told["Model hash"]) == ("blau, grün", "4", "b" * 10)


def test_a_jpegs_words_are_where_the_a1111_ui_looks(url: str) -> None:
    file = made(url, output_format="jpeg")
    comment = Image.open(io.BytesIO(file)).getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    text = comment[8:].decode("utf-16-be")
    told = httpx.post(f"{url}/sdapi/v1/png-info", json={"image": base64.b64encode(file).decode()}).json()
    assert told["info"] == text
    assert told["parameters"]["Steps"] == "2"


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(max_examples=60, deadline=None)
@given(json_text=TEXTS, infotext=TEXTS, output_format=st.sampled_from(["png", "webp", "jpeg"]))
def test_words_read_back(json_text: str, infotext: str, output_format: Any) -> None:
    words = Words(json.dumps(json_text, ensure_ascii=False), infotext)
    file = encode_image(Image.new("RGB", (8, 8)), output_format, words)
    assert read_words(checked_header(file, param="image")) == words


def test_words_that_are_too_long_for_a_jpeg_are_left_out_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    file = encode_image(Image.new("RGB", (8, 8)), "jpeg", Words("x" * 70_000, "short"))
    assert read_words(checked_header(file, param="image")) == Words("", "short")
    assert "a picture's xmp of 70" in caplog.text


def test_a_made_picture_is_believed(url: str) -> None:
    for output_format in ("png", "webp", "jpeg"):
        told = verified(url, made(url, output_format=output_format))
        assert told["file_format"] == output_format.upper()
        assert told["parameters"]["found"]
        assert told["parameters"]["this_model"]
        assert Parameters.model_validate(told["parameters"]["parameters"]).seed == 4
        credentials = told["credentials"]
        assert (credentials["state"], credentials["problems"]) == ("trusted", [])
        assert credentials["signer"] == "Darkroom trial, Darkroom trial signer"
        assert credentials["generator"].startswith("darkroom ")
        picture = credentials["picture"]
        assert (picture["model"], picture["run_id"], picture["data_hash"]) == ("tiny/3", "run", "data")
        assert "prompt" not in picture, "what is signed cannot be taken out again"
        assert told["watermark"]["state"] == "too_small"


def test_a_changed_picture_is_not_believed(url: str) -> None:
    file = made(url, output_format="jpeg")
    told = verified(url, file.replace(b'"seed":4', b'"seed":5', 1))
    assert told["parameters"]["parameters"]["seed"] == 5
    assert told["credentials"]["state"] == "invalid"
    assert "assertion.dataHash.mismatch" in told["credentials"]["problems"]
    again = io.BytesIO()
    Image.open(io.BytesIO(file)).convert("RGB").save(again, "PNG")
    stripped = verified(url, again.getvalue())
    assert (stripped["parameters"]["found"], stripped["credentials"]["state"]) == (False, "absent")


def test_a_mark_is_found_without_any_words(url: str) -> None:
    noise = Image.effect_noise((256, 256), 40).convert("RGB")
    file = io.BytesIO()
    embed(noise, "bbbbbb", 2.0).save(file, "JPEG", quality=80)
    told = verified(url, file.getvalue())["watermark"]
    assert (told["state"], told["payload"], told["this_model"], told["scale"]) == ("found", "bbbbbb", True, 1.0)
    assert told["confidence"] > 1 - 1e-6
    plain = io.BytesIO()
    noise.save(plain, "PNG")
    told = verified(url, plain.getvalue())["watermark"]
    assert (told["state"], told["payload"], told["this_model"]) == ("not_found", None, False)


def png(*chunks: tuple[str, str]) -> bytes:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in chunks:
        info.add_itxt(name, text)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


@pytest.mark.parametrize("text", ["{", "[" * 5_000, '{"model": 3}', "null", '{"seed": 1e999}'])
def test_words_that_are_no_parameters_are_not_found(url: str, text: str) -> None:
    told = verified(url, png(("darkroom", text), ("parameters", "a, b")))
    assert (told["parameters"]["found"], told["parameters"]["parameters"]) == (False, None)
    assert told["parameters"]["infotext"]["Prompt"] == "a, b"


def hostile() -> dict[str, tuple[bytes, str]]:
    bomb = io.BytesIO()
    Image.new("1", (20_000, MAX_UPLOAD_PIXELS // 20_000 + 1)).save(bomb, "PNG")
    noise = io.BytesIO()
    Image.effect_noise((64, 64), 40).save(noise, "PNG")
    whole = noise.getvalue()
    return {
        "text": (b"no picture", "a PNG, JPEG, WebP, GIF or BMP"),
        "empty": (b"", "a PNG, JPEG, WebP, GIF or BMP"),
        "bomb": (bomb.getvalue(), f"at most {MAX_UPLOAD_PIXELS} pixels"),
        "cut": (whole[: len(whole) // 2], "an undamaged picture"),
    }


@pytest.mark.parametrize("name", hostile())
def test_what_is_no_picture_is_refused(url: str, name: str) -> None:
    data, rule = hostile()[name]
    answer = httpx.post(f"{url}/v1/provenance/verify", files={"image": data or b""}, timeout=60)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == ("image", "invalid_request_error")
    assert rule in error["message"]


def test_a_missing_picture_is_named(url: str) -> None:
    answer = httpx.post(f"{url}/v1/provenance/verify", files={"other": b"x"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "image"
