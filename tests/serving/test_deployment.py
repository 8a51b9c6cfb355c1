"""A real Ray Serve: deploy by the command line, ask with the OpenAI client, fail without an outage, take down."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from PIL import Image

from cluster.stack import Stack
from training.bundle import Provenance, write_bundle
from training.conditioning import TextConfig, TextEncoder
from training.models import UNetConfig

Darkroom = Callable[..., Any]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    encoder = TextEncoder.from_config(TextConfig())
    torch.manual_seed(0)
    config = UNetConfig(resolution=8, widths=(8, 16), attention=(False, True), head_width=8, norm_groups=4)
    provenance = Provenance(
        run_id="run",
        data_hash="data",
        recipe={},
        created_utc="2026-01-01T00:00:00Z",
        step=1,
        code_version="test",
    )
    out = tmp_path_factory.mktemp("served") / "tiny"
    return write_bundle(out, unet=config.build(encoder.width), encoder=encoder, time_shift=1.0, provenance=provenance)


@pytest.fixture(scope="module")
def url(stack: Stack, darkroom: Darkroom, bundle: Path) -> Iterator[str]:
    done = darkroom("serve", bundle, "--json", timeout_s=200)
    assert done.returncode == 0, done.stderr
    endpoint = json.loads(done.stdout)
    assert endpoint["url"] == f"http://127.0.0.1:{stack.serve_port}"
    yield endpoint["url"]
    assert json.loads(darkroom("serve", "--down", "--json").stdout) == {"removed": True}


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


def test_a_deployment_that_fails_says_why_and_the_old_one_goes_on(
    url: str, darkroom: Darkroom, bundle: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(bundle, tmp_path / "broken")
    (broken / "unet" / "config.json").write_text("{}")
    done = darkroom("serve", broken, timeout_s=200)
    assert done.returncode == 1
    assert "could not be deployed. A file of the bundle has changed." in done.stderr
    assert "unet/config.json" in done.stderr
    assert "Traceback" not in done.stderr
    assert httpx.get(f"{url}/readyz").json()["model"] == "tiny"
    elsewhere = darkroom("serve", bundle, "--port", "1025")
    assert elsewhere.returncode == 1
    assert "Ray Serve listens on port" in elsewhere.stderr
