"""Replicas, Serve's controller and the deployment itself go away under load; no request fails."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cluster.stack import Stack
from tests.faults.load import Load
from tests.serving.deployed import replicas, serve_api, until, write_tiny

Darkroom = Callable[..., Any]
REPLICAS = ("--min-replicas", "2", "--max-replicas", "2")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("killed") / "tiny", seed=0)


@pytest.fixture(scope="module")
def url(stack: Stack, darkroom: Darkroom, bundle: Path) -> Iterator[str]:
    done = darkroom("serve", bundle, *REPLICAS, "--json", timeout_s=200)
    assert done.returncode == 0, done.stderr
    until(lambda: whole(stack))
    yield json.loads(done.stdout)["url"]
    darkroom("serve", "--down")
    assert serve_api(stack)["applications"] == {}


@contextmanager
def under_load(run: Callable[[], None], load: Load) -> Iterator[Load]:
    """Inside, requests come; at the end all are answered."""
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield load
    finally:
        load.stop()
        thread.join()


def more(load: Load, requests: int) -> None:
    """Wait until so many more requests have ended."""
    goal = load.count + requests
    until(lambda: load.count >= goal, 120)


def whole(stack: Stack) -> bool:
    """Whether both replicas answer, and a controller that says so."""
    try:
        return len(replicas(stack)) == 2
    except httpx.HTTPError:
        return False


def kill_replica(stack: Stack, chance: random.Random) -> None:
    """SIGKILL one of them while it works."""
    os.kill(chance.choice(replicas(stack))["pid"], signal.SIGKILL)


def kill_controller(stack: Stack) -> psutil.Process:
    """SIGKILL Serve's controller, which every cluster has once."""
    raylet = psutil.Process(replicas(stack)[0]["pid"]).parent()
    assert raylet is not None
    (controller,) = (each for each in raylet.children() if each.name().startswith("ray::ServeContr"))
    controller.kill()
    return controller


def no_request_failed(load: Load) -> None:
    assert load.failures == []
    assert load.pictures
    assert {seed: len(versions) for seed, versions in load.pictures.items()} == dict.fromkeys(load.pictures, 1)


def test_requests_survive_replicas_and_the_controller(url: str, stack: Stack) -> None:
    load = Load(url)
    chance = random.Random(0)  # noqa: S311
    with under_load(lambda: load.run(clients=4), load):
        more(load, 3)
        kill_replica(stack, chance)
        more(load, 3)
        kill_controller(stack)
        more(load, 3)
        until(lambda: whole(stack), 120)
        kill_replica(stack, chance)
        more(load, 6)
    no_request_failed(load)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_kills_a_controller_and_a_rolling_deploy_at_70_percent_load(
    url: str, stack: Stack, darkroom: Darkroom, bundle: Path
) -> None:
    chance = random.Random(1)  # noqa: S311
    undisturbed = Load(url)
    with under_load(lambda: undisturbed.run(clients=16), undisturbed):
        more(undisturbed, 16)
        started, before = time.monotonic(), undisturbed.count
        more(undisturbed, 60)
        capacity = (undisturbed.count - before) / (time.monotonic() - started)
    no_request_failed(undisturbed)
    calm = Load(url)
    with under_load(lambda: calm.arrive(0.7 * capacity), calm):
        more(calm, 60)
    no_request_failed(calm)
    load = Load(url)
    with under_load(lambda: load.arrive(0.7 * capacity), load):
        for number in range(10):
            until(lambda: whole(stack), 120)
            more(load, 5)
            kill_replica(stack, chance)
            if number == 4:
                more(load, 5)
                kill_controller(stack)
        until(lambda: whole(stack), 120)
        old = {each["pid"] for each in replicas(stack)}
        done = darkroom("serve", bundle, *REPLICAS, "--max-waiting-images", "65", timeout_s=300)  # other settings
        assert done.returncode == 0, done.stderr
        until(lambda: not old & {each["pid"] for each in replicas(stack)}, 120)
        more(load, 20)
    print(  # noqa: T201
        f"capacity {capacity:.1f}/s; undisturbed p50 {calm.quantile_s(0.5):.2f} s, p99 {calm.quantile_s(0.99):.2f} s; "
        f"killed {load.count} requests, p50 {load.quantile_s(0.5):.2f} s, p99 {load.quantile_s(0.99):.2f} s, "
        f"slowest {load.quantile_s(1):.2f} s"
    )
    no_request_failed(load)
    assert httpx.get(f"{url}/readyz").json()["status"] == "ready"
