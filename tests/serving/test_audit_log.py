"""The audit log: one line for a request, no prompts, bounded, and never in a request's way."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.app import create_app
from serving.audit_config import AuditConfig
from serving.audit_log import AuditLog
from serving.caller import Caller
from serving.config import BatchConfig, LimitConfig
from serving.engine import Engine
from serving.model import ModelCard
from serving.safety_checks import load_safety
from serving.safety_config import NoCheck, SafetyConfig, WordCheck
from serving.schemas import GenerationRequest
from tests.serving.live_server import serving, until
from training.canvas import Canvas
from training.objectives import Denoiser

CARD = ModelCard("tiny", 3, resolution=8, created=1_700_000_000, bundle_sha256="b" * 64)
LIMITS = LimitConfig(max_steps=1_000_000, default_steps=2, max_images_per_request=2)
REQUEST = GenerationRequest(prompt="a red circle", seed=4, width=8, height=8)
CALLER = Caller("openai", "req_1", "a team")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("audit-*")) for line in path.read_text().splitlines()]


@contextmanager
def served(denoiser: Denoiser, encoder: Any, audit: AuditConfig) -> Iterator[str]:
    config = BatchConfig(padded_rows=2, max_batch_rows=4, max_waiting_images=4)
    engine = Engine(denoiser, encoder, canvas=Canvas(8), config=config)
    safety = load_safety(SafetyConfig(prompts=WordCheck(words=("forbidden",)), images=NoCheck()))
    with serving(create_app(engine, CARD, LIMITS, safety=safety, audit=audit)) as port:
        yield f"http://127.0.0.1:{port}"


def test_every_request_leaves_a_line_that_says_how_it_ended(denoiser: Denoiser, encoder: Any, tmp_path: Path) -> None:
    with served(denoiser, encoder, AuditConfig(directory=str(tmp_path / "audit"))) as url:
        body = {"prompt": "a red circle", "seed": 4, "n": 2, "num_inference_steps": 3}
        answer = httpx.post(f"{url}/v1/images/generations", json=body, headers={"x-request-id": "mine"}, timeout=60)
        assert answer.status_code == 200
        assert httpx.post(f"{url}/sdapi/v1/txt2img", json={"prompt": "forbidden", "seed": 1}).status_code == 400
        too_many = httpx.post(f"{url}/v1/images/generations", json={"prompt": "word " * 40})
        assert too_many.status_code == 400
        with httpx.stream(
            "POST",
            f"{url}/v1/images/generations",
            json={"prompt": "a", "num_inference_steps": 1_000_000, "stream": True, "partial_images": 3},
            timeout=60,
        ):
            pass  # it leaves at once
        until(lambda: len(lines(tmp_path / "audit")) == 4)
    done, refused, invalid, left = lines(tmp_path / "audit")
    assert (done["outcome"], done["reason"], done["dialect"], done["request_id"]) == ("done", None, "openai", "mine")
    assert (done["model"], done["bundle_sha256"]) == ("tiny/3", "b" * 64)
    assert (done["seed"], done["images"], done["width"], done["steps"], done["edit"]) == (4, 2, 8, 3, False)
    assert done["prompt_sha256"] == hashlib.sha256(b"a red circle").hexdigest()
    assert done["seconds"] >= 0
    assert (refused["outcome"], refused["reason"], refused["dialect"]) == ("refused", "SafetyError", "a1111")
    assert refused["request_id"].startswith("req_")
    assert (invalid["outcome"], invalid["reason"]) == ("refused", "RequestError")
    assert left["outcome"] == "cancelled"
    text = json.dumps([done, refused, invalid, left])
    assert "red circle" not in text
    assert "forbidden" not in text
    assert (tmp_path / "audit").stat().st_mode & 0o077 == 0


def test_prompts_are_written_where_the_config_says_so(tmp_path: Path) -> None:
    with AuditLog(AuditConfig(directory=str(tmp_path), prompts=True), CARD) as audit:
        audit.write(REQUEST, CALLER, "done", seconds=1.23456)
    (line,) = lines(tmp_path)
    assert (line["prompt"], line["negative_prompt"], line["key"], line["seconds"]) == (
        "a red circle",
        "",
        "a team",
        1.235,
    )


def test_without_a_directory_there_is_no_log() -> None:
    with AuditLog(AuditConfig(), CARD) as audit:
        audit.write(REQUEST, CALLER, "done", seconds=1)
    assert (audit.written, audit.lost) == (0, 0)


def test_files_are_rotated_and_the_oldest_removed(tmp_path: Path) -> None:
    (tmp_path / "audit-elsewhere-1.jsonl").write_text("{}\n")
    os.utime(tmp_path / "audit-elsewhere-1.jsonl", (1, 1))
    (tmp_path / "other.jsonl").write_text("{}\n")
    config = AuditConfig(directory=str(tmp_path), max_file_bytes=10_000, max_files=3)
    with AuditLog(config, CARD) as audit:
        for seed in range(200):
            audit.write(REQUEST.model_copy(update={"seed": seed}), CALLER, "done", seconds=1)
    files = list(tmp_path.glob("audit-*"))
    assert len(files) == 3
    assert all(path.stat().st_size <= 10_000 for path in files)
    kept = sorted(line["seed"] for line in lines(tmp_path))
    assert kept == list(range(kept[0], 200)), "the newest, without a gap"
    assert (tmp_path / "other.jsonl").exists()
    assert audit.written == 200


def test_a_disk_that_fails_costs_lines_and_no_request(
    denoiser: Denoiser, encoder: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    with served(denoiser, encoder, AuditConfig(directory=str(file / "below"))) as url:
        for _ in range(3):
            assert httpx.post(f"{url}/v1/images/generations", json={"prompt": "a"}, timeout=60).status_code == 200
        until(lambda: "has lost 2 lines" in caplog.text)
    assert "the audit log has lost 1 lines: NotADirectoryError" in caplog.text


def test_it_goes_on_once_the_disk_works_again(tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    folder.write_text("in the way")
    with AuditLog(AuditConfig(directory=str(folder)), CARD) as audit:
        audit.write(REQUEST, CALLER, "done", seconds=1)
        until(lambda: audit.lost == 1)
        folder.unlink()
        audit.write(REQUEST, CALLER, "failed", seconds=1, reason="EngineError")
        until(lambda: audit.written == 1)
    assert [line["outcome"] for line in lines(folder)] == ["failed"]
