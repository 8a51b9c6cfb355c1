"""Every operation of the OpenAPI document, asked by schemathesis with whatever fits it and whatever does not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.app import create_app
from serving.config import BatchConfig, LimitConfig
from serving.engine import Engine
from serving.model import ModelCard
from serving.telemetry import Telemetry
from tests.serving.live_server import serving
from training.canvas import Canvas
from training.objectives import Denoiser

CARD = ModelCard("tiny", 3, resolution=8, created=1_700_000_000, bundle_sha256="b" * 64)
EXCLUDED = "positive_data_acceptance,allow_header_conformance"
"""Rules across fields and the tokens of a prompt are beyond a schema, so what fits it may be refused; and of a path
with two routes, Starlette's 405 names the methods of the first one only. All other checks run."""
OPTIONS = ("--max-examples", "5", "--generation-deterministic", "--no-color", "--exclude-checks", EXCLUDED)
LIMITS = LimitConfig(max_steps=3, default_steps=1, max_images_per_request=2, max_prompt_characters=200)


@pytest.fixture(scope="module")
def url(denoiser: Denoiser, encoder: Any) -> Iterator[str]:
    telemetry = Telemetry.of(CARD)
    config = BatchConfig(padded_rows=2, max_batch_rows=2)
    engine = Engine(denoiser, encoder, canvas=Canvas(8), config=config, observer=telemetry.observer)
    with serving(create_app(engine, CARD, LIMITS, telemetry=telemetry)) as port:
        yield f"http://127.0.0.1:{port}"


def test_what_the_document_says_is_what_happens(url: str, tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("st"), "run", f"{url}/openapi.json", *OPTIONS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr


def document(url: str) -> Any:
    return httpx.get(f"{url}/openapi.json").json()


def test_the_document_has_the_deployments_limits_and_no_status_that_is_never_sent(url: str) -> None:
    told = document(url)
    body = told["components"]["schemas"]["ImagesRequest"]["properties"]
    assert {"maximum": 2, "minimum": 1, "type": "integer"} in body["n"]["anyOf"]
    assert {"type": "null"} in body["n"]["anyOf"]
    assert body["model"]["anyOf"][0]["enum"] == ["tiny", "tiny/3"]
    assert body["prompt"]["maxLength"] == 200
    assert "HTTPValidationError" not in told["components"]["schemas"]
    for path, item in told["paths"].items():
        for operation in item.values():
            assert "422" not in operation["responses"]
            shape = operation["responses"]["default"]["content"]["application/json"]["schema"]["$ref"]
            assert shape.endswith("/Failure" if path.startswith("/sdapi/") else "/ErrorEnvelope")


def test_every_operation_has_a_name_of_its_own(url: str) -> None:
    names = [operation["operationId"] for item in document(url)["paths"].values() for operation in item.values()]
    assert len(names) == len(set(names))
