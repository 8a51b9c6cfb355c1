"""Models are tried, promoted, withdrawn, served beside each other and put to sleep under load; no request fails."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.stack import Stack
from serving.candidate import APPLICATION, PATH
from tests.faults.load import Load
from tests.serving.deployed import replicas, serve_api, until, write_tiny

Darkroom = Callable[..., Any]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rolled")
    return {name: write_tiny(folder / name, seed) for seed, name in enumerate(("first", "second", "third"))}


@pytest.fixture(scope="module")
def url(stack: Stack, darkroom: Darkroom, bundles: dict[str, Path]) -> Iterator[str]:
    done = darkroom("serve", bundles["first"], "--json", timeout_s=200)
    assert done.returncode == 0, done.stderr
    yield json.loads(done.stdout)["url"]
    darkroom("serve", "--down")
    assert serve_api(stack)["applications"] == {}


@pytest.fixture
def load(url: str) -> Iterator[Load]:
    """Two clients that ask all the time; nothing that they asked for has failed at the end."""
    load = Load(url)
    thread = threading.Thread(target=lambda: load.run(clients=2))
    thread.start()
    yield load
    load.stop()
    thread.join()
    assert load.count > 0
    assert load.failures == []


def running(url: str) -> str:
    return str(httpx.get(f"{url}/readyz", timeout=120).json()["model"])


def test_a_canary_that_does_well_takes_over(
    url: str, load: Load, darkroom: Darkroom, bundles: dict[str, Path], stack: Stack
) -> None:
    options = ("--canary", "50", "--bake", "6", "--min-requests", "1")
    done = darkroom("serve", bundles["second"], *options, timeout_s=300)
    assert done.returncode == 0, done.stderr
    assert "watching it for 6 s" in done.stderr
    assert running(url) == "second"
    until(lambda: set(serve_api(stack)["applications"]) == {"darkroom"})
    assert httpx.get(f"{url}{PATH}").json() == []


def test_a_canary_that_fails_is_rolled_back(
    url: str, load: Load, darkroom: Darkroom, bundles: dict[str, Path], stack: Stack
) -> None:
    before = running(url)
    options = ("--canary", "100", "--bake", "120", "--min-requests", "1", "--max-error-rate", "0")
    with ThreadPoolExecutor(1) as pool:
        rolling = pool.submit(darkroom, "serve", bundles["third"], *options, timeout_s=300)
        until(lambda: any(each["requests"] for each in httpx.get(f"{url}{PATH}").json()), 120)

        def killed() -> bool:
            """One that works takes a request with it; one that was idle did not, and its successor is next."""
            for replica in replicas(stack, APPLICATION):
                with suppress(ProcessLookupError):
                    os.kill(replica["pid"], signal.SIGKILL)
            return rolling.done()

        until(killed, 180)
        done = rolling.result()
    assert done.returncode == 1
    assert "was rolled back" in done.stderr
    assert "at most 0% of them fail" in done.stderr
    assert running(url) == before
    until(lambda: set(serve_api(stack)["applications"]) == {"darkroom"})


def test_two_models_are_served_at_one_address(
    url: str, load: Load, darkroom: Darkroom, bundles: dict[str, Path]
) -> None:
    main = running(url)
    done = darkroom("serve", bundles["third"], "--beside", timeout_s=200)
    assert done.returncode == 0, done.stderr
    until(lambda: [each["id"] for each in httpx.get(f"{url}/v1/models").json()["data"]] == [main, "third"])

    def ask(model: str) -> httpx.Response:
        body = {"prompt": "a robot", "model": model, "seed": 1, "num_inference_steps": 3}
        return httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)

    pictures = {ask(model).json()["data"][0]["b64_json"] for model in (main, "third")}
    assert len(pictures) == 2
    unknown = ask("fourth")
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "model_not_found"
    assert f"options: {main}, third" in unknown.json()["error"]["message"]
    assert json.loads(darkroom("serve", "third", "--beside", "--down", "--json").stdout) == {"removed": True}
    until(lambda: ask("third").status_code == 404)


def test_a_sleeping_model_wakes_for_the_next_request(
    url: str, darkroom: Darkroom, bundles: dict[str, Path], stack: Stack
) -> None:
    done = darkroom("serve", bundles["second"], "--min-replicas", "0", "--idle", "2", timeout_s=200)
    assert done.returncode == 0, done.stderr
    until(lambda: replicas(stack) == [], 180)
    body = {"prompt": "a robot", "num_inference_steps": 3}
    assert httpx.post(f"{url}/v1/images/generations", json=body, timeout=120).status_code == 200
