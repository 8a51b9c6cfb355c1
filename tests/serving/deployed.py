"""A tiny bundle to deploy, and what a real Ray Serve says of it."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import torch
from PIL import Image

from cluster.stack import Stack
from training.bundle import Provenance, write_bundle
from training.canvas import Canvas
from training.conditioning import TextConfig, TextEncoder
from training.models import UNetConfig
from training.objectives import RectifiedFlow


def write_tiny(out: Path, seed: int) -> Path:
    """A bundle; another seed gives other weights."""
    encoder = TextEncoder.from_config(TextConfig())
    torch.manual_seed(seed)
    config = UNetConfig(resolution=8, widths=(8, 16), attention=(False, True), head_width=8, norm_groups=4)
    provenance = Provenance(
        run_id="run", data_hash="data", recipe={}, created_utc="2026-01-01T00:00:00Z", step=1, code_version="test"
    )
    return write_bundle(
        out,
        network=config.build(encoder.shape),
        encoder=encoder,
        objective=RectifiedFlow(),
        canvas=Canvas(8),
        provenance=provenance,
    )


def serve_api(stack: Stack, method: str = "GET") -> Any:
    """Ray's own word on Serve."""
    token = stack.token_path.read_text() if stack.token_path else ""
    headers = {"authorization": f"Bearer {token}"}
    answer = httpx.request(method, f"{stack.dashboard_url}/api/serve/applications/", headers=headers, timeout=60)
    answer.raise_for_status()
    return answer.json() if answer.content else None


def replicas(stack: Stack, name: str = "darkroom") -> list[dict[str, Any]]:
    """Those of one application that answer."""
    found = serve_api(stack)["applications"].get(name, {}).get("deployments", {})
    return [each for deployment in found.values() for each in deployment["replicas"] if each["state"] == "RUNNING"]


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for a condition.

    Raises:
        AssertionError: it was not met in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        threading.Event().wait(0.05)


def pixels(b64_json: str) -> bytes:
    """What a picture shows, whatever its file says besides."""
    return Image.open(io.BytesIO(base64.b64decode(b64_json))).convert("RGB").tobytes()
