"""A real Ray Serve: deploy by the command line, ask with the OpenAI client, fail without an outage, take down."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from cluster.commands.serve import curl_line
from cluster.components import ray_environment, temp_dir
from cluster.stack import Stack
from serving.metrics import METRICS
from serving.rollout import drain_s
from tests.serving.deployed import pixels, replicas, serve_api, until, write_tiny
from training.bundle import manifest_sha256

Darkroom = Callable[..., Any]


SUFFIX = re.compile(r"_(bucket|sum|count)$")
BESIDE = """
import sys
import ray
from ray import serve

ray.init(namespace="beside", log_to_driver=False)

@serve.deployment(ray_actor_options={"num_cpus": 0})
class Beside:
    async def __call__(self, request):
        return "somebody else's"

serve.run(Beside.bind(), name="beside", route_prefix="/beside")
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("served") / "tiny", seed=0)


@pytest.fixture(scope="module")
def broken(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = shutil.copytree(bundle, tmp_path_factory.mktemp("broken") / "broken")
    (copy / "unet" / "config.json").write_text("{}")
    return copy


@pytest.fixture(scope="module")
def url(stack: Stack, darkroom: Darkroom, bundle: Path) -> Iterator[str]:
    done = darkroom("serve", bundle, "--json", timeout_s=200)
    assert done.returncode == 0, done.stderr
    endpoint = json.loads(done.stdout)
    assert endpoint["url"] == f"http://127.0.0.1:{stack.serve_port}"
    yield endpoint["url"]
    darkroom("serve", "--down")
    assert serve_api(stack)["applications"] == {}


@pytest.fixture(scope="module")
def beside(stack: Stack, url: str) -> Iterator[str]:
    """Somebody's application that a script started in the same Serve."""
    assert stack.token_path is not None
    environment = {**os.environ, **ray_environment(stack.token_path), "RAY_ADDRESS": stack.ray_address}
    started = subprocess.run(
        [sys.executable, "-c", BESIDE], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert started.returncode == 0, started.stderr
    page = f"{url}/beside"
    assert httpx.get(page).text == "somebody else's"
    yield page
    serve_api(stack, "DELETE")


def test_the_openai_client_gets_the_same_picture_alone_and_in_a_crowd(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]

        def make(seed: int) -> bytes:
            extra = {"seed": seed, "num_inference_steps": 2 + seed % 5}
            answer = client.images.generate(prompt="a robot face, 3D", size="8x8", extra_body=extra)
            assert answer.data is not None
            return base64.b64decode(answer.data[0].b64_json or "")

        alone = make(3)
        assert Image.open(io.BytesIO(alone)).size == (8, 8)
        with ThreadPoolExecutor(8) as pool:
            crowd = list(pool.map(make, range(8)))
        assert crowd[3] == alone
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(prompt="word " * 100)
        assert caught.value.param == "prompt"
        assert "at most 24" in caught.value.message
        assert caught.value.request_id
        assert "," not in caught.value.request_id


def test_every_kind_of_error_comes_through_the_proxy(url: str, stack: Stack) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        assert client.models.retrieve("tiny").owned_by == "darkroom"
        with pytest.raises(openai.NotFoundError) as unknown:
            client.models.retrieve("gpt-image-1")
        assert (unknown.value.code, bool(unknown.value.request_id)) == ("model_not_found", True)
        with pytest.raises(openai.BadRequestError) as wrong:
            client.images.generate(prompt="a robot", response_format="url")
        assert (wrong.value.param, bool(wrong.value.request_id)) == ("response_format", True)

        def ask(_: int) -> openai.APIError | None:
            try:
                patient = {"x-stainless-read-timeout": "600"}  # else it is told that it will not be in time
                long = {"num_inference_steps": 100}
                client.images.generate(prompt="a robot", n=8, extra_body=long, extra_headers=patient, timeout=2)
            except openai.APIError as error:
                return error
            return None

        with ThreadPoolExecutor(16) as pool:
            busy = [error for error in pool.map(ask, range(16)) if isinstance(error, openai.InternalServerError)]
    assert busy
    assert busy[0].code == "queue_full"
    assert 1 <= int(busy[0].response.headers["retry-after"]) <= 120
    assert busy[0].request_id
    until(lambda: httpx.get(f"{url}/readyz").json()["waiting_images"] == 0)
    body = json.dumps({"prompt": "half \ud800"})
    half = httpx.post(f"{url}/v1/images/generations", content=body, headers={"content-type": "application/json"})
    assert (half.status_code, half.json()["error"]["param"]) == (400, "prompt")
    assert drain_s(serve_api(stack)["applications"]["darkroom"]) == 120


def test_curl_gets_a_picture(url: str, tmp_path: Path) -> None:
    done = subprocess.run(["bash", "-c", curl_line(url)], cwd=tmp_path, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (8, 8)


def test_generate_writes_the_pictures_and_tells_their_seeds(url: str, darkroom: Darkroom, tmp_path: Path) -> None:
    done = darkroom("generate", "a robot face, 3D", "-o", tmp_path / "out.png", "--n", "2", "--seed", "7", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        {"path": str(tmp_path / "out-0.png"), "seed": 7},
        {"path": str(tmp_path / "out-1.png"), "seed": 8},
    ]
    with Image.open(tmp_path / "out-1.png") as picture:
        assert picture.size == (8, 8)
    refused = darkroom("generate", "a robot", "-o", tmp_path / "large.png", "--size", "512x512")
    assert refused.returncode == 2
    assert "options: 8x8, auto" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "large.png").exists()


def test_the_same_directory_with_other_weights_is_deployed(url: str, darkroom: Darkroom, bundle: Path) -> None:
    def state() -> tuple[str, bytes]:
        body = {"prompt": "a robot face, 3D", "seed": 1, "num_inference_steps": 2}
        answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)
        return httpx.get(f"{url}/readyz").json()["bundle_sha256"], answer.json()["data"][0]["b64_json"]

    before = state()
    assert before[0] == manifest_sha256(bundle)
    write_tiny(bundle, seed=1)
    done = darkroom("serve", bundle, timeout_s=200)
    assert done.returncode == 0, done.stderr
    after = state()
    assert after[0] == manifest_sha256(bundle) != before[0]
    assert after[1] != before[1]


def test_a_deployment_that_fails_says_why_and_all_that_ran_goes_on(
    url: str, beside: str, darkroom: Darkroom, bundle: Path, broken: Path
) -> None:
    done = darkroom("serve", broken, "--max-steps", "10", "--max-waiting-images", "4", timeout_s=200)
    assert done.returncode == 1
    assert "could not be deployed. A file of the bundle has changed." in done.stderr
    assert "unet/config.json" in done.stderr
    assert "Traceback" not in done.stderr
    assert httpx.get(f"{url}/readyz").json()["model"] == "tiny"
    assert httpx.get(beside).text == "somebody else's"
    for elsewhere in (("--port", "1025"), ("--host", "0.0.0.0")):  # noqa: S104
        refused = darkroom("serve", bundle, *elsewhere)
        assert refused.returncode == 1
        assert "Ray Serve listens on 127.0.0.1:" in refused.stderr


def test_a_request_survives_the_only_replica(url: str, stack: Stack) -> None:
    body = {"prompt": "long", "n": 2, "num_inference_steps": 100, "seed": 5}

    def make() -> httpx.Response:
        return httpx.post(f"{url}/v1/images/generations", json=body, timeout=120)

    undisturbed = make()
    longer = {**body, "n": 8, "seed": 4}
    with ThreadPoolExecutor(2) as pool:
        working = [pool.submit(make), pool.submit(httpx.post, f"{url}/v1/images/generations", json=longer, timeout=120)]
        until(lambda: bool(httpx.get(f"{url}/readyz", timeout=60).json()["running_images"]))
        for replica in replicas(stack):
            os.kill(replica["pid"], signal.SIGKILL)
        answers = [each.result() for each in working]
    assert [each.status_code for each in answers] == [200, 200]
    pictures, long = ([pixels(each["b64_json"]) for each in answer.json()["data"]] for answer in answers)
    assert pictures == long[1:3] == [pixels(each["b64_json"]) for each in undisturbed.json()["data"]]
    assert len({each.headers["x-request-id"] for each in answers}) == 2
    assert "," not in answers[0].headers["x-request-id"]


def test_rays_agents_have_the_replicas_metrics(url: str, stack: Stack) -> None:
    told = temp_dir(stack.home) / "ray" / "prom_metrics_service_discovery.json"
    until(told.exists)
    agents = json.loads(told.read_text())
    token = stack.token_path.read_text() if stack.token_path else ""

    def scraped() -> str:
        targets = [target for group in agents for target in group["targets"]]
        headers = {"authorization": f"Bearer {token}"}
        return "".join(httpx.get(f"http://{target}/metrics", headers=headers).text for target in targets)

    body = {"prompt": "a red circle", "num_inference_steps": 2}
    assert httpx.post(f"{url}/v1/images/generations", json=body, timeout=60).status_code == 200
    until(lambda: "ray_darkroom_images_total{" in scraped())
    lines = [line for line in scraped().splitlines() if line.startswith("ray_darkroom_")]
    assert {SUFFIX.sub("", line.partition("{")[0]).removeprefix("ray_") for line in lines} <= {
        metric.name for metric in METRICS
    }
    for label in ("model", "replica", "deployment", "application"):
        assert all(f'{label}="' in line for line in lines)


def test_down_and_a_failed_start_take_what_is_ours_and_nothing_else(
    url: str, beside: str, stack: Stack, darkroom: Darkroom, broken: Path
) -> None:
    assert json.loads(darkroom("serve", "--down", "--json").stdout) == {"removed": True}
    assert set(serve_api(stack)["applications"]) == {"beside"}
    assert httpx.get(beside).text == "somebody else's"
    gone = httpx.get(f"{url}/v1/models")
    assert gone.status_code == 404
    assert gone.json()["error"]["code"] == "unknown_url"
    assert gone.headers["x-request-id"]
    # no replica starts until somebody asks: it is the deployment's own question that finds the damage
    done = darkroom("serve", broken, "--min-replicas", "0", timeout_s=200)
    assert done.returncode == 1
    assert "could not be deployed. A file of the bundle has changed." in done.stderr
    assert "Traceback" not in done.stderr
    until(lambda: set(serve_api(stack)["applications"]) == {"beside"})
    assert httpx.get(beside).text == "somebody else's"
