"""The application around a tiny engine, with whatever settings a test is about."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from serving.admission_config import AdmissionConfig
from serving.app import create_app
from serving.config import BatchConfig, LimitConfig
from serving.engine import Engine
from serving.jobs_config import JobsConfig
from serving.keys import KeyFile, Quota, new_key, write_keys
from serving.model import ModelCard
from tests.serving.live_server import serving
from training.canvas import Canvas
from training.objectives import Denoiser

CARD = ModelCard("tiny", 3, resolution=8, created=1_700_000_000, bundle_sha256="b" * 64)
LIMITS = LimitConfig(max_steps=1_000_000, default_steps=4, max_images_per_request=4, max_prompt_characters=200)
ENDLESS = 1_000_000
"""Steps that no test waits for."""


@dataclass(frozen=True)
class Small:
    """One server.

    Attributes:
        url: where it answers.
        engine: its engine.
    """

    url: str
    engine: Engine

    @property
    def port(self) -> int:
        """Where it answers."""
        return int(self.url.rpartition(":")[2])

    @property
    def idle(self) -> bool:
        """Whether nothing waits or is made."""
        return self.engine.running_images == self.engine.waiting_images == 0

    def post(self, path: str, secret: str | None = None, headers: dict[str, str] | None = None, **body: Any) -> Any:
        """Send JSON."""
        return httpx.post(f"{self.url}{path}", json=body, headers=headed(secret, headers), timeout=60)

    def get(self, path: str, secret: str | None = None, headers: dict[str, str] | None = None) -> Any:
        """Ask."""
        return httpx.get(f"{self.url}{path}", headers=headed(secret, headers), timeout=60)


def headed(secret: str | None, headers: dict[str, str] | None) -> dict[str, str]:
    """The headers of a request by somebody with a key."""
    return (headers or {}) | ({} if secret is None else {"authorization": f"Bearer {secret}"})


@contextmanager
def small(
    denoiser: Denoiser,
    encoder: Any,
    *,
    admission: AdmissionConfig | None = None,
    jobs: JobsConfig | None = None,
    card: ModelCard = CARD,
) -> Iterator[Small]:
    """Serve."""
    batch = BatchConfig(padded_rows=2, max_batch_rows=4, max_waiting_images=4)
    engine = Engine(denoiser, encoder, canvas=Canvas(8), config=batch)
    with serving(create_app(engine, card, LIMITS, admission=admission, jobs=jobs)) as port:
        yield Small(f"http://127.0.0.1:{port}", engine)


def keys_file(folder: Path, **quotas: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """A file of keys by name, each with its quota and maybe a ``priority_ceiling``; and their secrets."""
    made = {
        name: new_key(name, Quota.model_validate(settings), ceiling)
        for name, settings in quotas.items()
        for ceiling in [settings.pop("priority_ceiling", 5)]
    }
    path = folder / "keys.json"
    write_keys(path, KeyFile(keys=tuple(key for key, _ in made.values())))
    return str(path), {name: secret for name, (_, secret) in made.items()}


def told(answer: httpx.Response) -> Any:
    """What an envelope holds."""
    return json.loads(answer.text)["error"]
