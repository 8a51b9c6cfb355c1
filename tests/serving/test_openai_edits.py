"""Edits and variations in OpenAI's dialect, through the real client; hostile pictures are refused by name."""

from __future__ import annotations

import base64
import inspect
import io
import json
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from cluster.commands.generate import start_files
from serving import uploads
from serving.app import create_app
from serving.client import request_images
from serving.config import BatchConfig, LimitConfig
from serving.engine import Engine
from serving.model import ModelCard
from tests.serving.live_server import serving
from training.canvas import Canvas
from training.errors import UsageError
from training.objectives import Denoiser
from training.sampling_config import SAMPLERS

CARD = ModelCard("tiny", 3, resolution=8, created=1_700_000_000, bundle_sha256="b" * 64)


@pytest.fixture(scope="module")
def url(denoiser: Denoiser, encoder: Any) -> Iterator[str]:
    batch = BatchConfig(padded_rows=2, max_batch_rows=4, max_waiting_images=4)
    engine = Engine(denoiser, encoder, canvas=Canvas(8), config=batch)
    app = create_app(engine, CARD, LimitConfig(default_steps=8, max_images_per_request=4))
    with serving(app) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


def png(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def given() -> Image.Image:
    ramp = np.linspace(0, 255, 8, dtype=np.uint8)
    blue = np.full((8, 8), 90, dtype=np.uint8)
    return Image.fromarray(np.stack([np.tile(ramp, (8, 1)), np.tile(ramp[:, None], (1, 8)), blue], -1))


def holed() -> Image.Image:
    """Transparent on the right half."""
    mask = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (4, 0, 8, 8))
    return mask


def pixels(data: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.b64_json))).convert("RGB")).astype(int)


def edited(client: openai.OpenAI, **fields: Any) -> np.ndarray:
    extra = {"seed": 4, **fields.pop("extra_body", {})}
    answer = client.images.edit(image=png(given()), prompt="a red circle", extra_body=extra, **fields)
    assert answer.data is not None
    return pixels(answer.data[0])


def test_strength_says_how_much_of_the_picture_is_left(client: openai.OpenAI) -> None:
    before = np.asarray(given()).astype(int)
    distance = [
        np.abs(edited(client, extra_body={"strength": strength}) - before).mean() for strength in (0.125, 0.5, 1.0)
    ]
    assert distance[0] < distance[1] < distance[2]
    assert np.array_equal(edited(client), edited(client, extra_body={"strength": 0.75}))
    assert np.array_equal(edited(client, input_fidelity="high"), edited(client, extra_body={"strength": 0.5}))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_the_mask_keeps_is_the_picture_bit_for_bit(client: openai.OpenAI, sampler: str) -> None:
    found = edited(client, mask=png(holed()), extra_body={"sampler": sampler})
    before = np.asarray(given()).astype(int)
    assert np.array_equal(found[:, :4], before[:, :4])
    assert np.abs(found[:, 4:] - before[:, 4:]).mean() > 5


def test_a_transparent_part_of_the_picture_is_its_mask(client: openai.OpenAI) -> None:
    picture = given().convert("RGBA")
    picture.putalpha(holed().getchannel("A"))
    answer = client.images.edit(image=png(picture), prompt="a red circle", extra_body={"seed": 4})
    assert answer.data is not None
    assert np.array_equal(pixels(answer.data[0])[:, :4], np.asarray(given()).astype(int)[:, :4])


def test_edits_stream_under_their_own_names(client: openai.OpenAI) -> None:
    events = list(client.images.edit(image=png(given()), prompt="a", stream=True, partial_images=2))
    assert [event.type for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
def test_variations_need_no_prompt_and_stay_near(client: openai.OpenAI) -> None:
    answer = client.images.create_variation(image=png(given()), n=2, extra_body={"seed": 1})
    assert answer.data is not None
    assert len(answer.data) == 2
    before = np.asarray(given()).astype(int)
    far = client.images.create_variation(image=png(given()), extra_body={"seed": 1, "strength": 1})
    assert far.data is not None
    assert np.abs(pixels(answer.data[0]) - before).mean() < np.abs(pixels(far.data[0]) - before).mean()


def test_a_seed_makes_an_edit_again_and_its_png_says_what_it_came_from(client: openai.OpenAI) -> None:
    answer = client.images.edit(image=png(given()), mask=png(holed()), prompt="a", extra_body={"seed": 9})
    assert answer.data is not None
    info = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or ""))).info["darkroom"]
    assert json.loads(info)["strength"] == 1.0
    assert "start_sha256" in info
    assert "mask_sha256" in info
    again = client.images.edit(image=png(given()), mask=png(holed()), prompt="a", extra_body={"seed": 9})
    assert again.data is not None
    assert answer.data[0].b64_json == again.data[0].b64_json


def test_other_sizes_and_kinds_are_fitted(client: openai.OpenAI) -> None:
    buffer = io.BytesIO()
    given().resize((64, 32)).save(buffer, "JPEG")
    answer = client.images.edit(image=buffer.getvalue(), prompt="a")
    assert answer.data is not None
    assert pixels(answer.data[0]).shape == (8, 8, 3)


def test_every_argument_of_the_clients_edits_is_taken_or_refused(client: openai.OpenAI) -> None:
    arguments = set(inspect.signature(openai.resources.Images.edit).parameters)
    no_value = {"self", "image", "prompt", "mask", "extra_headers", "extra_query", "extra_body", "timeout"}
    taken: dict[str, Any] = {
        "background": "opaque", "input_fidelity": "low", "model": "tiny", "n": 2, "output_compression": 100,
        "output_format": "webp", "partial_images": 0, "quality": "auto", "response_format": "b64_json",
        "safety_identifier": "x", "size": "8x8", "stream": False, "user": "x",
    }  # fmt: skip
    refused = {"complexity": "high", "frame_count": 2, "frame_duration_ms": 40, "markup": b"x", "svg": {"precision": 2}}
    assert arguments - no_value == set(taken) | set(refused)
    assert len(client.images.edit(image=png(given()), prompt="a", **taken).data or []) == 2
    for name in sorted(refused.keys() & arguments):
        with pytest.raises((openai.BadRequestError, openai.InternalServerError)) as caught:
            client.images.edit(image=png(given()), prompt="a", **{name: refused[name]})
        assert caught.value.status_code == 400
        assert caught.value.code == "unknown_parameter"


def bomb() -> bytes:
    """A PNG of 8000x8000 pixels in a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (8000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def gif_bomb() -> bytes:
    """A GIF of 1x1 pixels whose one frame has 6000x6000."""
    screen = struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    return b"GIF89a" + screen + b"," + struct.pack("<HHHHB", 0, 0, 6000, 6000, 0) + b"\x08\x02\x04\x01\0;"


REFUSED = [
    pytest.param({"image": b"no picture"}, "image", "a PNG, JPEG, WebP, GIF or BMP", id="text"),
    pytest.param({"image": b""}, "image", "a PNG, JPEG", id="empty"),
    pytest.param({"image": png(given())[:-40]}, "image", "an undamaged picture", id="cut"),
    pytest.param({"image": bomb()}, "image", "at most 16000000 pixels", id="bomb"),
    pytest.param({"image": bytes(20_000_001)}, "image", "at most 20000000 bytes", id="too many bytes"),
    pytest.param({"image": png(given()), "mask": png(given())}, "mask", "transparent part", id="opaque mask"),
    pytest.param(
        {"image": png(given()), "mask": png(given().convert("RGBA"))}, "mask", "transparent part", id="no hole"
    ),
    pytest.param({"image": gif_bomb()}, "image", "at most 16000000 pixels", id="a frame larger than its screen"),
    pytest.param({"image": png(given()), "mask": b"GIF89a"}, "mask", "a PNG, JPEG", id="no mask"),
]


@pytest.mark.parametrize(("files", "param", "rule"), REFUSED)
def test_bad_pictures_are_refused_by_field_and_rule(
    client: openai.OpenAI, files: dict[str, bytes], param: str, rule: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(prompt="a", **files)
    assert caught.value.param == param
    assert rule in caught.value.message


def test_forms_that_make_no_sense(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.BadRequestError, match="one: this model reads no more"):
        client.images.edit(image=[png(given()), png(given())], prompt="a")
    place = f"{url}/v1/images/edits"
    for request, param in [
        ({"data": {"prompt": "a"}}, "image"),
        ({"data": {"prompt": "a", "image": "text"}}, "image"),
        ({"files": {"image": png(given())}}, "prompt"),
        ({"files": {"image": png(given())}, "data": {"prompt": "a", "strength": "2"}}, "strength"),
        ({"files": {"image": png(given())}, "data": {"prompt": "a", "strength": "nan"}}, "strength"),
        ({"files": {"image": png(given())}, "data": {"prompt": "a", "n": "many"}}, "n"),
        ({"json": {"prompt": "a"}}, "prompt"),
    ]:
        answer = httpx.post(place, **request)  # type: ignore[arg-type]
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_previews_are_spread_over_the_steps_that_are_taken_and_show_what_is_kept(client: openai.OpenAI) -> None:
    extra = {"strength": 0.25, "num_inference_steps": 16}
    events = list(
        client.images.edit(
            image=png(given()), mask=png(holed()), prompt="a", stream=True, partial_images=3, extra_body=extra
        )
    )
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image"] * 3 + ["completed"]
    for event in events:
        assert np.array_equal(pixels(event)[:, :4], np.asarray(given()).astype(int)[:, :4])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_edit_is_the_same_alone_and_in_a_crowd_with_previews(client: openai.OpenAI, sampler: str) -> None:
    alone = edited(client, mask=png(holed()), extra_body={"sampler": sampler})

    def other(number: int) -> None:
        steps = {"seed": number, "num_inference_steps": 3 + 5 * number, "guidance_scale": 1 + number % 2}
        client.images.generate(prompt=f"thing {number}", extra_body=steps)

    crowd = [threading.Thread(target=other, args=(number,)) for number in range(3)]
    for each in crowd:
        each.start()
    streamed = client.images.edit(
        image=png(given()),
        mask=png(holed()),
        prompt="a red circle",
        stream=True,
        partial_images=3,
        extra_body={"seed": 4, "sampler": sampler},
    )
    found = pixels(list(streamed)[-1])
    for each in crowd:
        each.join(20)
    assert np.array_equal(found, alone)


def test_every_mode_of_a_picture_and_of_a_mask_is_read(client: openai.OpenAI) -> None:
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16"):
        deep = Image.fromarray(np.full((8, 8), 4000, np.uint16))
        image = deep if mode == "I;16" else given().convert(mode)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG" if mode == "CMYK" else "PNG")
        assert client.images.edit(image=buffer.getvalue(), prompt="a").data
    palette = Image.new("P", (8, 8), 3)
    palette.putpalette(bytes(range(256)) * 3)
    assert client.images.edit(image=png(given()), mask=png(palette, transparency=3), prompt="a").data
    grey = Image.fromarray(np.full((8, 8), 4000, np.uint16))
    assert client.images.edit(image=png(given()), mask=png(grey, transparency=4000), prompt="a").data


def multipart(url: str, body: bytes, kind: str = "multipart/form-data; boundary=x") -> httpx.Response:
    return httpx.post(f"{url}/v1/images/edits", content=body, headers={"content-type": kind})


@pytest.mark.parametrize("charset", ["undefined", "punycode", "utf-16", "unicode_escape", "hex"])
def test_a_form_in_a_charset_of_its_own_is_no_defect(url: str, charset: str) -> None:
    for name, value in (("prompt", "\\ud800"), ("\\ud800", "a"), ("size", "\\ud800")):
        body = f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n--x--\r\n'.encode()
        answer = multipart(url, body, f"multipart/form-data; boundary=x; charset={charset}")
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]


def test_forms_that_are_none_or_too_many_parts_are_refused(url: str) -> None:
    assert multipart(url, b"abc").status_code == 400
    assert multipart(url, b"abc", "multipart/form-data").status_code == 400
    answer = httpx.post(f"{url}/v1/images/edits", files=[("image", png(given()))] * 18)
    assert (answer.status_code, "Too many files" in answer.json()["error"]["message"]) == (400, True)


def test_a_body_is_refused_once_it_is_too_large(url: str) -> None:
    def chunks(size: int) -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for _ in range(0, size, 500_000):
            yield bytes(500_000)

    for path, kind, limit in (
        ("images/generations", "application/json", 1_000_000),
        ("images/edits", "multipart/form-data; boundary=x", 41_000_000),
    ):
        for content in (bytes(limit + 1), chunks(limit + 1)):
            answer = httpx.post(f"{url}/v1/{path}", content=content, headers={"content-type": kind}, timeout=60)
            assert answer.status_code == 413, answer.text
            assert answer.json()["error"]["code"] == "body_too_large"
            assert str(limit) in answer.json()["error"]["message"]


def test_the_event_loop_goes_on_while_a_picture_is_decoded(
    url: str, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding, go_on = threading.Event(), threading.Event()
    original = uploads.decode

    def slow(*arguments: Any) -> Image.Image:
        decoding.set()
        assert go_on.wait(20)
        return original(*arguments)

    monkeypatch.setattr(uploads, "decode", slow)
    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(client.images.edit(image=png(given()), prompt="a").data))
    thread.start()
    assert decoding.wait(20)
    try:
        assert httpx.get(f"{url}/healthz", timeout=10).status_code == 200
    finally:
        go_on.set()
    thread.join(20)
    assert made[0]


def test_the_command_line_changes_a_picture_where_a_mask_lets_it(url: str, tmp_path: Path) -> None:
    image, mask, out = (tmp_path / name for name in ("image.png", "mask.png", "out.png"))
    image.write_bytes(png(given()))
    mask.write_bytes(png(holed()))
    command = [sys.executable, "-m", "cluster", "generate", "a red circle", "--image", str(image), "--mask", str(mask)]
    options = ["--sampler", "heun", "--strength", "0.5", "--seed", "4", "-o", str(out), "--json", "--url", url]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [{"path": str(out), "seed": 4}]
    made = Image.open(out)
    assert np.array_equal(np.asarray(made)[:, :4], np.asarray(given())[:, :4])
    told = json.loads(made.info["darkroom"])
    assert (told["sampler"], told["strength"], told["seed"]) == ("heun", 0.5, 4)


def test_what_the_command_line_cannot_send_is_refused(url: str, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(png(given()))
    assert start_files(None, None, None) == {}
    for arguments, words in [
        ((None, image, None), ("--mask needs a picture", "--image PICTURE")),
        ((None, None, 0.5), ("--strength needs a picture", "0.5")),
        ((tmp_path / "nowhere.png", None, None), ("cannot be read", "nowhere.png", "No such file")),
        ((image, tmp_path, None), ("cannot be read", "directory")),
    ]:
        with pytest.raises(UsageError) as caught:
            start_files(*arguments)
        assert all(word in caught.value.as_text() for word in words)
    for body, files, words in [
        ({"prompt": "a"}, {"image": b"no picture"}, ("Invalid value for 'image'", "a PNG, JPEG")),
        ({"prompt": "\ud800"}, {"image": png(given())}, ("ud800", "whole Unicode characters")),
    ]:
        with pytest.raises(UsageError) as caught:
            request_images(url, body, files=files)
        assert all(word in caught.value.as_text() for word in words)
