"""Who is let in, for how much, and what those are told who are not: over a real socket, with the dialects' clients."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serving.admission_config import AdmissionConfig
from serving.keys import KeyFile, read_keys, write_keys
from serving.schemas import GenerationRequest
from tests.serving.live_server import until
from tests.serving.small import ENDLESS, Small, keys_file, small, told
from training.objectives import Denoiser

IMAGES = "/v1/images/generations"


@pytest.fixture(scope="module")
def secrets() -> dict[str, str]:
    return {}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, secrets: dict[str, str]) -> str:
    path, made = keys_file(
        tmp_path_factory.mktemp("keys"),
        open={},
        minute={"images_per_minute": 2},
        day={"images_per_day": 1, "megapixel_steps_per_day": 100},
        urgent={"priority_ceiling": 0},
        gone={},
    )
    secrets.update(made)
    return path


@pytest.fixture(scope="module")
def server(denoiser: Denoiser, encoder: Any, file: str) -> Iterator[Small]:
    with small(denoiser, encoder, admission=AdmissionConfig(keys=file)) as server:
        yield server


def client(server: Small, secret: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=secret, max_retries=0)


def test_a_request_without_a_key_is_told_how_to_have_one(server: Small) -> None:
    for answer in (server.post(IMAGES, prompt="a"), server.get("/v1/models"), server.post("/v1/jobs", prompt="a")):
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == 'Bearer, Basic realm="darkroom"'
        assert answer.headers["x-request-id"]
        assert told(answer) == {
            "message": "There is no API key in this request.\n  rule:    the header Authorization has Bearer SECRET",
            "type": "invalid_request_error",
            "param": None,
            "code": "missing_api_key",
        }
    for path in ("/healthz", "/readyz", "/"):
        assert server.get(path).status_code == 200


def test_the_openai_client_is_let_in_by_its_key_and_by_no_other(server: Small, secrets: dict[str, str]) -> None:
    with client(server, secrets["open"]) as right, client(server, "dr_wrong") as wrong:
        assert right.images.generate(prompt="a").data
        with pytest.raises(openai.AuthenticationError) as caught:
            wrong.images.generate(prompt="a")
    assert caught.value.code == "invalid_api_key"
    assert "This API key is not known." in caught.value.message
    assert "dr_wrong" not in caught.value.message


def test_the_a1111_dialect_takes_basic_authentication(server: Small, secrets: dict[str, str]) -> None:
    def ask(auth: Any) -> httpx.Response:
        return httpx.post(f"{server.url}/sdapi/v1/txt2img", json={"prompt": "a", "steps": 2}, auth=auth, timeout=60)

    assert len(ask(("open", secrets["open"])).json()["images"]) == 1
    for auth in (None, ("other", secrets["open"]), ("open", "wrong")):
        refused = ask(auth)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == 'Basic realm="darkroom"'
        assert refused.json()["error"] in {"missing_api_key", "invalid_api_key"}
    odd = httpx.get(f"{server.url}/sdapi/v1/samplers", headers=[(b"authorization", b"Basic \xff:")])
    assert odd.status_code == 401


def test_a_key_that_is_taken_out_is_refused_by_a_server_that_runs(
    server: Small, file: str, secrets: dict[str, str]
) -> None:
    assert server.get("/v1/models", secrets["gone"]).status_code == 200
    path = Path(file)
    write_keys(path, KeyFile(keys=tuple(key for key in read_keys(path).keys if key.name != "gone")))
    until(lambda: server.get("/v1/models", secrets["gone"]).status_code == 401)
    assert server.get("/v1/models", secrets["open"]).status_code == 200


def test_a_quota_is_told_with_every_answer_and_refuses_what_is_above_it(server: Small, secrets: dict[str, str]) -> None:
    first = server.post(IMAGES, secrets["minute"], prompt="a", n=2)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-limit-images"] == "2"
    assert first.headers["x-ratelimit-remaining-images"] == "0"
    with client(server, secrets["minute"]) as limited, pytest.raises(openai.RateLimitError) as caught:
        limited.images.generate(prompt="a")
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.type == "rate_limit_error"
    assert "rule:    at most 2 images in 60 s" in caught.value.message
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30
    assert "x-should-retry" not in caught.value.response.headers
    a1111 = server.post("/sdapi/v1/txt2img", secrets["minute"], prompt="a", steps=2)
    assert (a1111.status_code, a1111.json()["error"]) == (429, "rate_limit_exceeded")


def test_who_would_wait_for_hours_or_for_ever_is_told_not_to(server: Small, secrets: dict[str, str]) -> None:
    for_ever = server.post(IMAGES, secrets["day"], prompt="a", n=2)
    assert (for_ever.status_code, for_ever.headers["x-should-retry"]) == (429, "false")
    assert "retry-after" not in for_ever.headers
    assert "quota is too small for this" in told(for_ever)["message"]
    assert server.post(IMAGES, secrets["day"], prompt="a").status_code == 200
    hours = server.post(IMAGES, secrets["day"], prompt="a")
    assert (hours.status_code, hours.headers["x-should-retry"], hours.headers["retry-after"]) == (429, "false", "120")


def test_what_is_refused_costs_nothing(denoiser: Denoiser, encoder: Any, tmp_path: Path) -> None:
    path, secrets = keys_file(tmp_path, poor={"images_per_minute": 1})
    admission = AdmissionConfig(keys=path, quotas=str(tmp_path / "quotas"))
    with small(denoiser, encoder, admission=admission) as server:
        assert server.post(IMAGES, secrets["poor"], prompt="one " * 20).status_code == 400, "too many tokens"
        assert server.post(IMAGES, secrets["poor"], prompt="a").status_code == 200
    with small(denoiser, encoder, admission=admission) as server:
        assert server.post(IMAGES, secrets["poor"], prompt="a").status_code == 429, "another replica counts on"


def test_a_quota_that_cannot_be_counted_is_a_503_that_another_replica_may_mend(
    denoiser: Denoiser, encoder: Any, tmp_path: Path
) -> None:
    path, secrets = keys_file(tmp_path, poor={"images_per_minute": 1})
    (tmp_path / "quotas").write_text("no folder")
    with small(denoiser, encoder, admission=AdmissionConfig(keys=path, quotas=str(tmp_path / "quotas"))) as server:
        answer = server.post(IMAGES, secrets["poor"], prompt="a")
        assert (answer.status_code, told(answer)["code"]) == (503, "engine_error")
        assert str(tmp_path) not in answer.text
        assert server.idle


def test_priorities_end_at_the_keys_ceiling(server: Small, secrets: dict[str, str]) -> None:
    def ask(name: str, priority: str) -> Any:
        return server.post(IMAGES, secrets[name], {"x-darkroom-priority": priority}, prompt="a")

    assert ask("urgent", "0").status_code == ask("open", "5").status_code == ask("open", "9").status_code == 200
    refused = ask("open", "4")
    assert refused.status_code == 403
    assert told(refused) == {
        "message": "This API key may not be so urgent.\n  value:   4\n  rule:    x-darkroom-priority of 5 to 9",
        "type": "invalid_request_error",
        "param": "x-darkroom-priority",
        "code": "priority_not_allowed",
    }
    for odd in ("10", "-1", "x", ""):
        assert (ask("open", odd).status_code, told(ask("open", odd))["code"]) == (400, "invalid_value")


@pytest.mark.parametrize("deadline", ["0", "-1", "nan", "inf", "1e9", "soon", ""])
def test_a_deadline_that_makes_no_sense_is_refused_with_the_rule(
    server: Small, secrets: dict[str, str], deadline: str
) -> None:
    refused = server.post(IMAGES, secrets["open"], {"x-darkroom-deadline-s": deadline}, prompt="a")
    assert refused.status_code == 400
    assert told(refused)["param"] == "x-darkroom-deadline-s"
    assert f"value:   {deadline!r}\n  rule:    seconds, above 0 and at most 86400" in told(refused)["message"]


@pytest.mark.parametrize("header", ["x-darkroom-deadline-s", "x-stainless-read-timeout"])
def test_what_cannot_be_made_in_time_is_refused_at_once_with_the_prediction(
    server: Small, secrets: dict[str, str], header: str
) -> None:
    server.post(IMAGES, secrets["open"], prompt="a")  # what a step costs is known now
    with client(server, secrets["open"]) as hurried, pytest.raises(openai.APIStatusError) as caught:
        hurried.images.generate(prompt="a", extra_body={"num_inference_steps": ENDLESS}, extra_headers={header: "1.5"})
    assert caught.value.status_code == 408
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert caught.value.body["code"] == "deadline_exceeded"  # type: ignore[index,call-overload]
    assert "value:   '1.5 s'\n  rule:    they take at least" in caught.value.message
    until(lambda: server.idle)


def test_a_deadline_that_others_deadlines_leave_no_time_for_is_refused(server: Small, secrets: dict[str, str]) -> None:
    server.post(IMAGES, secrets["open"], prompt="a")
    steps = int(
        1000 * 40 / server.engine.predicted_s(small_request(steps=1000))
    )  # 40 s of work as predicted, due in 60 s: no 30 s are left for another
    body = {"prompt": "a", "num_inference_steps": steps, "stream": True}
    headers = {"authorization": f"Bearer {secrets['open']}", "x-darkroom-deadline-s": "60"}
    with httpx.stream("POST", f"{server.url}{IMAGES}", json=body, headers=headers, timeout=60) as first:
        assert first.status_code == 200
        body = {"prompt": "a", "num_inference_steps": steps * 3 // 4}
        refused = server.post(IMAGES, secrets["open"], {"x-darkroom-deadline-s": "61"}, **body)
        assert (refused.status_code, told(refused)["code"]) == (408, "deadline_exceeded")
        assert "value:   '61 s'\n  rule:    they take at least" in told(refused)["message"]
    until(lambda: server.idle)


def small_request(steps: int) -> GenerationRequest:
    return GenerationRequest(prompt="a", seed=0, steps=steps, guidance_scale=3.0, width=8, height=8)


def test_a_queue_is_as_long_as_its_work(denoiser: Denoiser, encoder: Any) -> None:
    with small(denoiser, encoder, admission=AdmissionConfig(max_waiting_s=5)) as server:
        server.post(IMAGES, prompt="a")
        with httpx.Client() as patient:
            body = {"prompt": "a", "num_inference_steps": ENDLESS, "stream": True}
            with patient.stream("POST", f"{server.url}{IMAGES}", json=body, timeout=60) as long:
                assert long.status_code == 200, "nothing is before it, so it is not too large"
                with client(server, "any") as late, pytest.raises(openai.InternalServerError) as caught:
                    late.images.generate(prompt="a")
        assert (caught.value.status_code, caught.value.code) == (503, "queue_full")
        assert "rule:    at most 5 s of work wait" in caught.value.message
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 120
        until(lambda: server.idle)
        assert server.post(IMAGES, prompt="a").status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (IMAGES, {"num_inference_steps": ENDLESS}),
        (IMAGES, {"num_inference_steps": ENDLESS, "stream": True, "partial_images": 1}),
        ("/sdapi/v1/txt2img", {"steps": ENDLESS}),
    ],
    ids=["whole", "stream", "a1111"],
)
def test_a_client_that_leaves_frees_its_rows_in_every_dialect(
    server: Small, secrets: dict[str, str], path: str, body: dict[str, Any]
) -> None:
    headers = {"authorization": f"Bearer {secrets['open']}"}
    leaving = httpx.Client(timeout=60)
    asked = threading.Thread(target=_ask, args=(leaving, f"{server.url}{path}", {"prompt": "a", **body}, headers))
    asked.start()
    until(lambda: server.engine.running_images == 1)
    leaving.close()
    asked.join(20)
    until(lambda: server.idle)


def _ask(client: httpx.Client, url: str, body: Any, headers: dict[str, str]) -> None:
    with pytest.raises((httpx.HTTPError, RuntimeError, OSError)):
        client.post(url, json=body, headers=headers, timeout=httpx.Timeout(60, read=0.5))
