"""Clients that ask without pause, by every way in, and remember every answer."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.serving.deployed import pixels

SEEDS = 6
"""Different pictures that are asked for."""
STEPS = 30
"""Long enough to be at work when something is killed."""
TIMEOUT_S = 120.0


@dataclass
class Load:
    """Requests for the same few pictures over and over: each way in must give the same ones.

    Attributes:
        url: the endpoint.
        failures: what went wrong, in words.
        seconds: of every request.
        pictures: by seed: every version of it that was seen.
    """

    url: str
    failures: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    pictures: dict[int, Counter[bytes]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def run(self, clients: int) -> None:
        """Closed loop: so many clients, each with one request at a time, until ``stop``."""
        with ThreadPoolExecutor(clients) as pool:
            for number in range(clients):
                pool.submit(self._client, number)

    def arrive(self, per_second: float, key: int = 0) -> None:
        """Open loop: Poisson arrivals, whether or not earlier requests have been answered, until ``stop``."""
        chance = random.Random(key)  # noqa: S311 - arrivals, no secrets
        with ThreadPoolExecutor(64) as pool:
            number = 0
            while not self._stopped.wait(chance.expovariate(per_second)):
                pool.submit(self._one, number)
                number += 1

    def stop(self) -> None:
        """No more requests; those on their way are waited for."""
        self._stopped.set()

    @property
    def count(self) -> int:
        """Requests that were answered or failed."""
        return len(self.seconds)

    def quantile_s(self, share: float) -> float:
        """The latency that this share of the requests kept."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def _client(self, number: int) -> None:
        while not self._stopped.is_set():
            self._one(number)
            number += 1

    def _one(self, number: int) -> None:
        seed = number % SEEDS
        ask = (self._openai, self._stream, self._a1111)[number % 3]
        started = time.monotonic()
        try:
            shown = ask(seed)
        except (httpx.HTTPError, ValueError, LookupError, OSError) as error:
            with self._lock:
                self.failures.append(f"{ask.__name__}: {type(error).__name__}: {error}")
                self.seconds.append(time.monotonic() - started)
            return
        with self._lock:
            self.seconds.append(time.monotonic() - started)
            for offset, picture in enumerate(shown):
                self.pictures.setdefault(seed + offset, Counter())[picture] += 1

    def _openai(self, seed: int) -> list[bytes]:
        body = {"prompt": "a robot", "seed": seed, "n": 2, "num_inference_steps": STEPS, "guidance_scale": 3}
        answer = self._post("/v1/images/generations", body)
        return [pixels(each["b64_json"]) for each in answer["data"]]

    def _a1111(self, seed: int) -> list[bytes]:
        body = {"prompt": "a robot", "seed": seed, "batch_size": 2, "steps": STEPS, "cfg_scale": 3}
        return [pixels(each) for each in self._post("/sdapi/v1/txt2img", body)["images"]]

    def _stream(self, seed: int) -> list[bytes]:
        """Previews may come again; every picture comes once."""
        body = {"prompt": "a robot", "seed": seed, "n": 2, "num_inference_steps": STEPS, "guidance_scale": 3}
        shown: dict[int, bytes] = {}
        with httpx.stream(
            "POST",
            f"{self.url}/v1/images/generations",
            json={**body, "stream": True, "partial_images": 3},
            timeout=TIMEOUT_S,
        ) as answer:
            lines = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
        for event in lines:
            if event.get("type") == "image_generation.completed":
                if event["image_index"] in shown:
                    raise ValueError(f"image {event['image_index']} came twice")
                shown[event["image_index"]] = pixels(event["b64_json"])
        if answer.status_code != 200 or len(shown) != 2:
            raise ValueError(f"{answer.status_code}: {len(shown)} images; {str(lines[-1:])[:300]}")
        return [shown[index] for index in sorted(shown)]

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        answer = httpx.post(f"{self.url}{path}", json=body, timeout=TIMEOUT_S)
        if answer.status_code != 200:
            raise ValueError(f"{answer.status_code}: {answer.text[:300]}")
        return answer.json()
