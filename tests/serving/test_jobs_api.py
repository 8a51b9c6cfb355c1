"""Jobs over a real socket: submitted, followed, cancelled, fetched, repeated and forgotten."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from serving.admission_config import AdmissionConfig
from serving.jobs_config import JobsConfig
from tests.serving.live_server import until
from tests.serving.small import ENDLESS, Small, keys_file, small, told
from training.objectives import Denoiser


@pytest.fixture(scope="module")
def server(denoiser: Denoiser, encoder: Any) -> Iterator[Small]:
    with small(denoiser, encoder) as server:
        yield server


def submit(server: Small, headers: dict[str, str] | None = None, **body: Any) -> Any:
    answer = server.post("/v1/jobs", headers=headers, **{"prompt": "a red circle", **body})
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    return answer.json()


def ended(server: Small, job_id: str) -> Any:
    status = {}

    def over() -> bool:
        nonlocal status
        status = server.get(f"/v1/jobs/{job_id}").json()
        return status["status"] in {"succeeded", "failed", "cancelled"}

    until(over)
    return status


def events(server: Small, job_id: str, after: int | None = None) -> list[tuple[int, str, Any]]:
    headers = {} if after is None else {"last-event-id": str(after)}
    answer = server.get(f"/v1/jobs/{job_id}/events", headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in answer.text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return found


def png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def pixels(file: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(file)))


def test_a_jobs_pictures_are_those_of_the_same_request_in_another_dialect(server: Small) -> None:
    asked = {"n": 2, "seed": 7, "num_inference_steps": 3, "negative_prompt": "blue"}
    job = submit(server, **asked)
    assert (job["object"], job["status"], job["seed"], job["size"], job["n"]) == ("job", "queued", 7, "8x8", 2)
    status = ended(server, job["id"])
    assert status["status"] == "succeeded"
    assert (status["progress"], status["error"], status["webhook"], status["cancelling"]) == (1.0, None, None, False)
    assert status["expires_at"] == pytest.approx(status["ended_at"] + 86_400, abs=1)
    other = server.post("/v1/images/generations", prompt="a red circle", **asked).json()["data"]
    assert [image["seed"] for image in status["images"]] == [7, 8]
    for image, same in zip(status["images"], other, strict=True):
        answer = server.get(image["url"])
        assert answer.headers["content-type"] == "image/png"
        assert len(answer.content) == image["bytes"]
        assert hashlib.sha256(answer.content).hexdigest() == image["sha256"]
        assert np.array_equal(pixels(answer.content), pixels(base64.b64decode(same["b64_json"])))


def test_a_job_starts_from_a_picture_and_keeps_what_its_mask_keeps(server: Small) -> None:
    start = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    mask = Image.fromarray(np.where(np.arange(8) < 4, 255, 0).astype(np.uint8)[None].repeat(8, 0))
    job = submit(server, image=png(start), mask=png(mask), output_format="webp")
    status = ended(server, job["id"])
    answer = server.get(status["images"][0]["url"])
    assert answer.headers["content-type"] == "image/webp"
    made = pixels(answer.content)
    assert np.array_equal(made[:, 4:], np.asarray(start)[:, 4:])
    assert not np.array_equal(made[:, :4], np.asarray(start)[:, :4])


def test_events_tell_the_whole_story_and_go_on_where_a_reader_left(server: Small) -> None:
    job = submit(server, n=2)
    told_all = events(server, job["id"])
    assert [number for number, _, _ in told_all] == list(range(1, len(told_all) + 1))
    kinds = [kind for _, kind, _ in told_all]
    assert kinds[0] == "progress"
    assert sorted(data["index"] for _, kind, data in told_all if kind == "image") == [0, 1]
    assert told_all[-1][1:] == ("succeeded", {"status": "succeeded"})
    assert events(server, job["id"], after=2) == told_all[2:]
    after = server.get(f"/v1/jobs/{job['id']}/events", headers={"last-event-id": str(len(told_all))})
    assert after.status_code == 204, "nothing more comes: a browser stops asking"
    odd = server.get(f"/v1/jobs/{job['id']}/events", headers={"last-event-id": "x"})
    assert (odd.status_code, told(odd)["param"]) == (400, "Last-Event-ID")


def test_a_cancelled_job_has_freed_its_rows_when_the_answer_comes(server: Small) -> None:
    job = submit(server, n=3, num_inference_steps=ENDLESS)
    until(lambda: server.get(f"/v1/jobs/{job['id']}").json()["status"] == "running")
    assert 0 <= server.get(f"/v1/jobs/{job['id']}").json()["progress"] < 0.1
    status = server.post(f"/v1/jobs/{job['id']}/cancel").json()
    assert (status["status"], status["cancelling"], status["images"]) == ("cancelled", False, [])
    until(lambda: server.idle)
    again = server.post(f"/v1/jobs/{job['id']}/cancel").json()
    assert again == status, "an end is an end"
    assert events(server, job["id"])[-1][1] == "cancelled"


def test_an_idempotency_key_makes_one_job(server: Small) -> None:
    key = {"idempotency-key": "order 17"}
    first = server.post("/v1/jobs", headers=key, prompt="a", n=1)
    again = server.post("/v1/jobs", headers=key, n=1, prompt="a")
    assert (first.status_code, again.status_code) == (202, 200)
    assert again.json()["id"] == first.json()["id"]
    assert again.json()["seed"] == first.json()["seed"], "also where it was drawn"
    assert again.headers["idempotency-replayed"] == "true"
    other = server.post("/v1/jobs", headers=key, prompt="b")
    assert other.status_code == 422
    assert told(other) == {
        "message": "This Idempotency-Key was used with another body.\n"
        f"  value:   it made {first.json()['id']}\n"
        "  rule:    one key, one request\n"
        "  mend:    send a new key with a new request",
        "type": "invalid_request_error",
        "param": "idempotency-key",
        "code": "idempotency_key_reused",
    }
    odd = server.post("/v1/jobs", headers={"idempotency-key": "x" * 256}, prompt="a")
    assert (odd.status_code, told(odd)["param"]) == (400, "idempotency-key")
    ended(server, first.json()["id"])


def test_a_refused_job_is_no_job_and_its_key_can_be_used_again(server: Small) -> None:
    key = {"idempotency-key": "later"}
    blocking = [submit(server, n=4, num_inference_steps=ENDLESS)["id"]]
    refused = server.post("/v1/jobs", headers=key, prompt="a", n=4)
    assert (refused.status_code, told(refused)["code"]) == (503, "queue_full")
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    for job_id in blocking:
        server.post(f"/v1/jobs/{job_id}/cancel")
    until(lambda: server.idle)
    taken = server.post("/v1/jobs", headers=key, prompt="a", n=4)
    assert taken.status_code == 202
    assert ended(server, taken.json()["id"])["status"] == "succeeded"


@pytest.mark.parametrize(
    ("body", "param", "code", "text"),
    [
        ({}, "prompt", "missing_required_parameter", "Missing required parameter: 'prompt'."),
        ({"prompt": "a", "stream": True}, "stream", "unknown_parameter", "options: prompt, negative_prompt, model"),
        ({"prompt": "a", "n": 5}, "n", "invalid_value", "value:   5\n  rule:    at most 4"),
        ({"prompt": "a", "size": "9x9"}, "size", "invalid_value", "This model makes images of 8x8 pixels."),
        ({"prompt": "a", "mask": "x"}, "mask", "invalid_value", "given without image"),
        ({"prompt": "a", "strength": 0.5}, "strength", "invalid_value", "given without image"),
        ({"prompt": "a", "image": "!"}, "image", "invalid_value", "a picture in base64"),
        ({"prompt": "a", "image": "AAAA"}, "image", "invalid_value", "that are no picture"),
        ({"prompt": "a", "adapter": "none"}, "adapter", "invalid_value", "adapter"),
        ({"prompt": "one " * 20}, "prompt", "invalid_value", "tokens"),
        ({"prompt": "a", "webhook_url": "https://example.org"}, "webhook_url", "invalid_value", "no webhook secret"),
    ],
)
def test_bad_jobs_name_field_value_and_rule(server: Small, body: Any, param: str, code: str, text: str) -> None:
    answer = server.post("/v1/jobs", **body)
    assert answer.status_code == 400, answer.text
    assert (told(answer)["param"], told(answer)["code"]) == (param, code)
    assert text in told(answer)["message"]


@pytest.mark.parametrize("path", ["", "/events", "/cancel", "/images/0"])
@pytest.mark.parametrize("job_id", ["job_" + "0" * 24, "active", "..%2Factive", "x"])
def test_jobs_that_are_not_there_are_said_to_be_none(server: Small, path: str, job_id: str) -> None:
    method = "POST" if path == "/cancel" else "GET"
    answer = httpx.request(method, f"{server.url}/v1/jobs/{job_id}{path}")
    assert answer.status_code == 404
    assert told(answer)["code"] in {"job_not_found", "unknown_url"}
    assert "Traceback" not in answer.text


def test_an_image_that_is_not_finished_is_not_there(server: Small) -> None:
    job = submit(server)
    ended(server, job["id"])
    answer = server.get(f"/v1/jobs/{job['id']}/images/9")
    assert (answer.status_code, told(answer)["code"]) == (404, "image_not_found")


def test_a_job_is_seen_by_its_own_key_alone(denoiser: Denoiser, encoder: Any, tmp_path: Path) -> None:
    path, secrets = keys_file(tmp_path, mine={}, other={})
    with small(denoiser, encoder, admission=AdmissionConfig(keys=path)) as server:
        job = server.post("/v1/jobs", secrets["mine"], {"idempotency-key": "1"}, prompt="a").json()
        for place in ("", "/events", "/images/0"):
            assert server.get(f"/v1/jobs/{job['id']}{place}", secrets["other"]).status_code == 404
        assert server.post(f"/v1/jobs/{job['id']}/cancel", secrets["other"]).status_code == 404
        assert server.get(f"/v1/jobs/{job['id']}", secrets["mine"]).status_code == 200
        other = server.post("/v1/jobs", secrets["other"], {"idempotency-key": "1"}, prompt="b")
        assert other.status_code == 202, "idempotency keys are each client's own"


def test_jobs_are_forgotten_after_a_while_and_their_idempotency_keys_too(
    denoiser: Denoiser, encoder: Any, tmp_path: Path
) -> None:
    jobs = JobsConfig(folder=str(tmp_path), results_kept_s=0.5, lease_s=0.4)
    with small(denoiser, encoder, jobs=jobs) as server:
        job = submit(server, {"idempotency-key": "1"})
        until(lambda: server.get(f"/v1/jobs/{job['id']}").status_code == 404)
        message = told(server.get(f"/v1/jobs/{job['id']}"))["message"]
        assert message.endswith("rule:    a job of this API key, at most 0.5 s after its end")
        assert not list(tmp_path.glob("job_*"))
        assert submit(server, {"idempotency-key": "1"})["id"] != job["id"]


def test_the_document_tells_of_jobs(server: Small) -> None:
    document = server.get("/openapi.json").json()
    paths = {path for path in document["paths"] if path.startswith("/v1/jobs")}
    assert len(paths) == 5 - ("/v1/webhook-secret" not in document["paths"])
    fields = document["components"]["schemas"]["JobRequest"]["properties"]
    assert {"prompt", "image", "mask", "webhook_url", "adapter"} <= set(fields)
