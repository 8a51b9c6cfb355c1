"""The HTTP API over a real socket: the unmodified OpenAI client, and the envelope of everything that goes wrong."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import inspect
import io
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from serving.app import create_app
from serving.config import BatchConfig, LimitConfig
from serving.engine import MAX_FAILURES, Engine
from serving.model import ModelCard
from tests.serving.live_server import serving, until
from training.canvas import Canvas
from training.objectives import Denoiser
from training.sampling_config import SAMPLERS

CARD = ModelCard("tiny", 3, resolution=8, created=1_700_000_000, bundle_sha256="b" * 64, run_id="run", data_hash="data")
LIMITS = LimitConfig(max_steps=1_000_000, default_steps=4, max_images_per_request=4, max_prompt_characters=200)


@pytest.fixture(scope="module")
def engine(denoiser: Denoiser, encoder: Any) -> Engine:
    return Engine(
        denoiser,
        encoder,
        canvas=Canvas(8),
        config=BatchConfig(padded_rows=2, max_batch_rows=4, max_waiting_images=4),
    )


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with serving(create_app(engine, CARD, LIMITS)) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


def picture(data: Any) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(data.b64_json)))
    image.load()
    return image


def post(url: str, **body: Any) -> httpx.Response:
    content = json.dumps({"prompt": "a red circle", **body})  # httpx cannot send half a character
    headers = {"content-type": "application/json"}
    return httpx.post(f"{url}/v1/images/generations", content=content, headers=headers, timeout=60)


def test_the_openai_client_generates_images_and_a_seed_reproduces_them(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {
        "prompt": "a robot face, 3D",
        "model": "tiny",
        "n": 2,
        "size": "8x8",
        "response_format": "b64_json",
        "extra_body": {
            "seed": 7,
            "num_inference_steps": 5,
            "guidance_scale": 2.0,
            "negative_prompt": "blue",
        },
    }
    first, again = client.images.generate(**arguments), client.images.generate(**arguments)
    assert first.data is not None
    assert again.data is not None
    assert [item.seed for item in first.data] == [7, 8]  # type: ignore[attr-defined]
    for one, other in zip(first.data, again.data, strict=True):
        assert picture(one).size == (8, 8)
        assert picture(one).mode == "RGB"
        assert np.array_equal(np.asarray(picture(one)), np.asarray(picture(other)))
    assert first.size == "8x8"
    assert first.output_format == "png"
    assert first.usage is not None
    assert first.usage.input_tokens == first.usage.total_tokens == 5


def test_without_a_seed_the_drawn_one_is_told_and_makes_the_picture_again(client: openai.OpenAI) -> None:
    drawn = client.images.generate(prompt="a red circle").data
    assert drawn is not None
    seed = drawn[0].seed  # type: ignore[attr-defined]
    again = client.images.generate(prompt="a red circle", extra_body={"seed": seed}).data
    assert again is not None
    assert np.array_equal(np.asarray(picture(drawn[0])), np.asarray(picture(again[0])))


@pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
def test_output_formats(client: openai.OpenAI, output_format: Any) -> None:
    answer = client.images.generate(prompt="a red circle", output_format=output_format, extra_body={"seed": 1})
    assert answer.data is not None
    assert picture(answer.data[0]).format == output_format.upper()


TAKEN: dict[str, list[Any]] = {
    "prompt": ["a red circle"],
    "background": ["auto", "opaque", None],
    "model": ["tiny", "tiny/3", None],
    "moderation": ["auto", "low", None],
    "n": [2, None],
    "output_compression": [100, None],
    "output_format": ["png", "webp", "jpeg", None],
    "partial_images": [0, None],
    "quality": ["auto", "standard", None],
    "response_format": ["b64_json", None],
    "safety_identifier": ["someone", None],
    "size": ["auto", "8x8", None],
    "stream": [False, None],
    "style": ["vivid", "natural", None],
    "user": ["someone"],
    # of files that this server does not make
    "complexity": [None],
    "frame_count": [None],
    "frame_duration_ms": [None],
    "svg": [None],
}
DISOBEYED: dict[str, list[Any]] = {
    "background": ["transparent"],
    "complexity": ["high"],
    "frame_count": [3],
    "frame_duration_ms": [40],
    "model": ["gpt-image-1"],
    "output_compression": [50, 101, -1],
    "output_format": ["gif", "svg"],
    "partial_images": [2, 4, -1],
    "quality": ["low", "medium", "high", "xhigh", "max", "hd"],
    "response_format": ["url"],
    "size": ["1024x1024"],
    "svg": [{"precision": 2}],
}


def _each(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}={value}") for name, values in table.items() for value in values]


def test_every_argument_of_the_openai_client_is_accounted_for() -> None:
    arguments = set(inspect.signature(openai.resources.Images.generate).parameters)
    assert arguments - {"self", "extra_headers", "extra_query", "extra_body", "timeout"} == set(TAKEN)


@pytest.mark.parametrize(("name", "value"), _each(TAKEN))
def test_what_the_openai_client_may_say_is_taken(client: openai.OpenAI, name: str, value: Any) -> None:
    answer = client.images.generate(**{"prompt": "a red circle", name: value})
    assert answer.data is not None
    assert len(answer.data) == (2 if (name, value) == ("n", 2) else 1)
    assert picture(answer.data[0]).size == (8, 8)


@pytest.mark.parametrize(("name", "value"), _each(DISOBEYED))
def test_what_would_be_disobeyed_is_refused_by_name_and_value(client: openai.OpenAI, name: str, value: Any) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.images.generate(**{"prompt": "a red circle", name: value})
    assert caught.value.status_code == (404 if name == "model" else 400)
    assert caught.value.param == name
    assert caught.value.request_id
    assert str(value) in caught.value.message or caught.value.code == "unknown_parameter"
    assert "rule:" in caught.value.message or "options:" in caught.value.message


@pytest.mark.parametrize("name", ["seed", "num_inference_steps", "guidance_scale", "negative_prompt", "sampler"])
def test_null_means_the_default(url: str, name: str) -> None:
    assert post(url, **{name: None}).status_code == 200


@pytest.mark.parametrize("output_format", ["webp", "jpeg"])
def test_compression_is_obeyed_by_lossy_files(client: openai.OpenAI, output_format: Any) -> None:
    def size(quality: int) -> int:
        extra = {"seed": 1, "num_inference_steps": 1}
        answer = client.images.generate(
            prompt="a red circle", output_format=output_format, output_compression=quality, extra_body=extra
        )
        assert answer.data is not None
        assert picture(answer.data[0]).format == output_format.upper()
        return len(answer.data[0].b64_json or "")

    assert size(0) < size(95)


def test_a_png_carries_the_parameters_that_made_it(url: str) -> None:
    answer = post(url, seed=4, n=2, num_inference_steps=3, negative_prompt="blue").json()
    image = Image.open(io.BytesIO(base64.b64decode(answer["data"][1]["b64_json"])))
    told = json.loads(image.info["darkroom"])
    assert (told["model"], told["prompt"], told["negative_prompt"]) == ("tiny/3", "a red circle", "blue")
    assert (told["seed"], told["steps"], told["width"], told["height"]) == (5, 3, 8, 8)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "darkroom"
    assert httpx.get(f"{client.base_url}models/tiny/3").json()["version"] == 3
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-image-1")
    assert caught.value.code == "model_not_found"
    assert "options: tiny, tiny/3" in caught.value.message
    assert caught.value.request_id


def test_health(url: str) -> None:
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    ready = httpx.get(f"{url}/readyz")
    assert ready.status_code == 200
    assert (ready.json()["model"], ready.json()["bundle_sha256"]) == ("tiny/3", "b" * 64)


def test_a_broken_engine_is_not_ready(url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_failures", MAX_FAILURES)
    ready = httpx.get(f"{url}/readyz")
    assert (ready.status_code, ready.json()["status"]) == (503, "not ready")
    answer = post(url)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "engine_error"
    assert httpx.get(f"{url}/healthz").status_code == 200


BAD = [
    ({"prompt": "word " * 30}, "prompt", "invalid_value", ["31 tokens", "prompt <= 12 tokens"]),
    ({"prompt": "x" * 201}, "prompt", "invalid_value", ["201 characters", "at most 200 characters"]),
    ({"prompt": "half \ud800"}, "prompt", "invalid_value", ["half \\ud800", "whole Unicode characters"]),
    ({"negative_prompt": "\udc00"}, "negative_prompt", "invalid_value", ["\\udc00", "whole Unicode characters"]),
    ({"model": "\ud800"}, "model", "invalid_value", ["\\ud800", "whole Unicode characters"]),
    ({"user": "\ud800"}, "user", "invalid_value", ["\\ud800", "whole Unicode characters"]),
    ({"prompt": None}, "prompt", "missing_required_parameter", ["'prompt'"]),
    ({"prompt": 5}, "prompt", "invalid_value", ["5", "valid string"]),
    ({"size": "1024x1024"}, "size", "invalid_value", ["1024x1024", "8x8, auto"]),
    ({"size": "8x16"}, "size", "invalid_value", ["8x16", "was trained at", "8x8, auto"]),
    ({"size": "²x²"}, "size", "invalid_value", ["WIDTHxHEIGHT"]),
    ({"n": 5}, "n", "invalid_value", ["5", "at most 4"]),
    ({"n": 0}, "n", "invalid_value", ["0", "greater than or equal to 1"]),
    ({"num_inference_steps": 1_000_001}, "num_inference_steps", "invalid_value", ["1000001", "at most 1000000"]),
    ({"guidance_scale": 99}, "guidance_scale", "invalid_value", ["99", "at most 20"]),
    ({"guidance_scale": 0.5}, "guidance_scale", "invalid_value", ["0.5", "greater than or equal to 1"]),
    ({"seed": -1}, "seed", "invalid_value", ["-1", "greater than or equal to 0"]),
    ({"seed": 2**53 - 1, "n": 2}, "seed", "invalid_value", [str(2**53 - 1), f"at most {2**53 - 2}"]),
    ({"response_format": "url"}, "response_format", "invalid_value", ["'url'", "'b64_json'"]),
    ({"output_format": "gif"}, "output_format", "invalid_value", ["'gif'", "'png', 'webp' or 'jpeg'"]),
    ({"sampler": "plms"}, "sampler", "invalid_value", ["'plms'", "'euler', 'heun', 'dpmpp_2m', 'ancestral' or 'lcm'"]),
    ({"stepz": 4}, "stepz", "unknown_parameter", ["'stepz'", "num_inference_steps"]),
]


@pytest.mark.parametrize(("body", "param", "code", "texts"), BAD)
def test_bad_parameters_name_field_value_and_rule(
    url: str, body: dict[str, Any], param: str, code: str, texts: list[str]
) -> None:
    answer = post(url, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"], error["code"]) == (
        400,
        "invalid_request_error",
        param,
        code,
    )
    for text in texts:
        assert text in error["message"]
    assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("content", "code", "text"),
    [
        (b'{"prompt": ', "invalid_json", "not valid JSON"),
        (b"[1]", "invalid_body", "not a JSON object"),
        (b'{"n": 1}', "missing_required_parameter", "'prompt'"),
        (b'{"prompt": "a", "guidance_scale": NaN}', "invalid_value", "finite number"),
        (b"\xff\xfe", "invalid_json", ""),
        (b'{"prompt": "a", "\\ud800": 1}', "invalid_body", "unicode"),
    ],
)
def test_bad_bodies(url: str, content: bytes, code: str, text: str) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{url}/v1/images/generations", content=content, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == code
    assert text in answer.json()["error"]["message"]


def test_unknown_routes_methods_and_models_answer_in_the_envelope(url: str) -> None:
    nowhere = httpx.get(f"{url}/v1/nothing", headers={"x-request-id": "mine-1"})
    assert nowhere.status_code == 404
    assert nowhere.json()["error"]["code"] == "unknown_url"
    assert nowhere.headers["x-request-id"] == "mine-1"
    wrong = httpx.get(f"{url}/v1/images/generations")
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    assert wrong.json()["error"]["code"] == "method_not_allowed"
    unknown = post(url, model="dall-e-3")
    assert unknown.status_code == 404
    assert unknown.json()["error"]["param"] == "model"
    assert "options: tiny, tiny/3" in unknown.json()["error"]["message"]


def test_a_client_that_leaves_frees_its_rows_and_a_full_queue_says_when_to_come_back(url: str, engine: Engine) -> None:
    with httpx.Client() as leaving:
        request = leaving.build_request(
            "POST",
            f"{url}/v1/images/generations",
            json={"prompt": "long", "n": 4, "num_inference_steps": 500_000},
        )
        abandoned = threading.Thread(target=_send_and_leave, args=(leaving, request))
        abandoned.start()
        until(lambda: engine.running_images == 1 and engine.waiting_images == 3)
        answer = post(url, n=4)
        assert answer.status_code == 503
        assert 1 <= int(answer.headers["retry-after"]) <= 120
        assert answer.json()["error"]["type"] == "server_error"
        assert answer.json()["error"]["code"] == "queue_full"
        assert answer.json()["error"]["message"].startswith("The server is busy.")
        abandoned.join(20)
    until(lambda: engine.running_images == engine.waiting_images == 0)
    assert post(url).status_code == 200


def _send_and_leave(client: httpx.Client, request: httpx.Request) -> None:
    request.extensions["timeout"] = {"connect": 5, "read": 2, "write": 5, "pool": 5}
    with pytest.raises(httpx.ReadTimeout):
        client.send(request)


def test_a_defect_is_a_500_in_the_envelope_with_a_request_id(
    url: str, encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defective(prompt: str) -> None:
        raise KeyError(prompt)

    monkeypatch.setattr(encoder, "check", defective)
    answer = post(url)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "a red circle" not in answer.text
    assert answer.headers["x-request-id"]


def stream(client: openai.OpenAI, **fields: Any) -> list[Any]:
    extra = {"seed": 3, "num_inference_steps": 8, **fields.pop("extra_body", {})}
    return list(client.images.generate(prompt="a red circle", stream=True, extra_body=extra, **fields))


@pytest.mark.parametrize("previews", [0, 1, 3])
def test_the_openai_client_reads_a_stream_of_previews_and_the_picture(client: openai.OpenAI, previews: int) -> None:
    events = stream(client, partial_images=previews)
    partial, completed = events[:-1], events[-1]
    assert [event.type for event in partial] == ["image_generation.partial_image"] * previews
    assert [event.partial_image_index for event in partial] == list(range(previews))
    assert completed.type == "image_generation.completed"
    assert completed.usage.input_tokens == 4
    whole = client.images.generate(prompt="a red circle", extra_body={"seed": 3, "num_inference_steps": 8})
    assert whole.data is not None
    final = np.asarray(picture(completed))
    assert np.array_equal(final, np.asarray(picture(whole.data[0]))), "previews change nothing about the picture"
    assert picture(completed).info["darkroom"] == picture(whole.data[0]).info["darkroom"]
    distances = [np.abs(np.asarray(picture(event)).astype(int) - final).mean() for event in partial]
    assert all(distances), "a preview is not the picture yet"
    assert distances == sorted(distances, reverse=True), "each is nearer to it"


def test_more_previews_than_steps_are_as_many_as_there_are(client: openai.OpenAI) -> None:
    events = stream(client, partial_images=3, extra_body={"num_inference_steps": 2})
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "completed"]
    events = stream(client, partial_images=3, extra_body={"num_inference_steps": 1})
    assert [event.type.rpartition(".")[2] for event in events] == ["completed"]


def test_a_stream_of_several_images_tells_them_apart(client: openai.OpenAI) -> None:
    events = stream(client, n=2, partial_images=2, output_format="webp", extra_body={"sampler": "heun"})
    completed = {event.image_index: event for event in events if event.type.endswith("completed")}
    partial = [(event.image_index, event.partial_image_index) for event in events if event.type.endswith("image")]
    assert sorted(partial) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [completed[index].seed for index in (0, 1)] == [3, 4]
    assert {picture(event).format for event in events} == {"WEBP"}


def test_what_a_stream_is_refused_for_is_a_status_and_no_stream(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        stream(client, size="16x16")
    assert caught.value.param == "size"
    answer = post(url, partial_images=2)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "partial_images")
    assert "stream: true" in answer.json()["error"]["message"]


def test_a_stream_that_fails_on_the_way_raises_in_the_client(
    client: openai.OpenAI, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = engine.denoiser

    class Failing:
        def __call__(self, *arguments: Any) -> Any:
            calls.append(arguments)
            if len(calls) > 3:
                raise RuntimeError("the device is gone")
            return original(*arguments)

        alpha, sigma = staticmethod(original.alpha), staticmethod(original.sigma)

    monkeypatch.setattr(engine, "denoiser", Failing())
    extra = {"num_inference_steps": 8, "guidance_scale": 1}
    events = iter(client.images.generate(prompt="a", stream=True, partial_images=3, extra_body=extra))
    assert next(events).type == "image_generation.partial_image"
    with pytest.raises(openai.APIError, match="Denoising failed"):
        next(events)
    monkeypatch.undo()
    assert stream(client)[-1].type == "image_generation.completed"


def test_a_reader_that_leaves_a_stream_frees_its_rows(url: str, engine: Engine) -> None:
    body = {"prompt": "long", "n": 2, "num_inference_steps": 500_000, "stream": True, "partial_images": 1}
    with httpx.Client() as leaving, leaving.stream("POST", f"{url}/v1/images/generations", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        until(lambda: engine.running_images == 1 and engine.waiting_images == 1)
    until(lambda: engine.running_images == engine.waiting_images == 0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_makes_a_picture_of_its_own(client: openai.OpenAI, sampler: str) -> None:
    def made(name: str) -> Any:
        answer = client.images.generate(prompt="a cat", extra_body={"seed": 1, "sampler": name})
        assert answer.data is not None
        return picture(answer.data[0])

    image = made(sampler)
    assert json.loads(image.info["darkroom"])["sampler"] == sampler
    assert np.array_equal(np.asarray(image), np.asarray(made(sampler)))
    others = [np.asarray(made(name)) for name in SAMPLERS if name != sampler]
    assert not any(np.array_equal(np.asarray(image), other) for other in others)


@pytest.mark.parametrize(
    ("version", "fails_at"), [("2.4", "http.response.body"), ("2.4", "http.response.start"), ("2.3", None)]
)
def test_a_stream_has_freed_its_rows_when_it_ends(
    denoiser: Denoiser, encoder: Any, version: str, fails_at: str | None
) -> None:
    body = {"prompt": "a", "n": 2, "num_inference_steps": 200, "stream": True, "partial_images": 1}
    path = "/v1/images/generations"
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": [(b"content-type", b"application/json")], "asgi": {"version": "3.0", "spec_version": version}}
    received = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

    async def receive() -> Any:
        return next(received, {"type": "http.disconnect"})

    async def send(message: Any) -> None:
        if message["type"] == fails_at:
            raise OSError("the client has gone")

    async def main() -> int:
        batch = BatchConfig(padded_rows=2, max_batch_rows=4, max_waiting_images=4)
        async with Engine(denoiser, encoder, canvas=Canvas(8), config=batch) as engine:
            with contextlib.suppress(Exception):  # what the server is told of it
                await create_app(engine, CARD, LIMITS)(scope, receive, send)
            return sum(not job.cancelled for job in engine._line.jobs)

    assert asyncio.run(main()) == 0


def test_a_client_that_leaves_while_it_sends_a_form_is_no_defect(
    url: str, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("ERROR"), socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as leaving:
        leaving.sendall(
            b"POST /v1/images/edits HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
            b"Content-Length: 1000\r\n\r\n--x\r\n"
        )
        until(lambda: httpx.get(f"{url}/healthz").status_code == 200)
    until(lambda: httpx.get(f"{url}/healthz").status_code == 200)
    assert [record.message for record in caplog.records if "defect" in record.message] == []
