"""Webhooks: signed, tried again, and never sent inside."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from serving.errors import RequestError
from serving.jobs_config import JobsConfig
from serving.webhook import WebhookSecrets
from serving.webhook_address import is_public, resolve
from tests.serving.live_server import until
from tests.serving.small import small, told
from tests.serving.test_jobs_api import ended, submit
from training.errors import ConfigError
from training.objectives import Denoiser


@dataclass
class Receiver:
    """A server that is called.

    Attributes:
        url: where it listens.
        answers: the statuses of its first answers; then 204.
        calls: the headers and bodies that came.
    """

    url: str
    answers: list[int]
    calls: list[tuple[dict[str, str], bytes]] = field(default_factory=list)


@contextmanager
def receiver(*answers: int) -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            heard.calls.append(({name.lower(): value for name, value in self.headers.items()}, body))
            status = heard.answers.pop(0) if heard.answers else 204
            self.send_response(status)
            self.send_header("content-length", "0")
            if status == 302:
                self.send_header("location", "/elsewhere")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    heard = Receiver(f"http://127.0.0.1:{server.server_port}/hook", list(answers))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield heard
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def config(folder: Path, **settings: Any) -> JobsConfig:
    secret = folder / "secret"
    secret.write_text("0123456789abcdef" * 4)
    given = {"webhook_secret": str(secret), "webhook_private": True, "webhook_pauses_s": (0.01, 0.01), "lease_s": 0.4}
    return JobsConfig(folder=str(folder / "jobs"), **(given | settings))


def test_a_webhook_is_signed_and_tried_until_it_is_heard(denoiser: Denoiser, encoder: Any, tmp_path: Path) -> None:
    with receiver(500, 302) as heard, small(denoiser, encoder, jobs=config(tmp_path)) as server:
        job = submit(server, webhook_url=heard.url)
        until(lambda: server.get(f"/v1/jobs/{job['id']}").json()["webhook"] == "delivered")
        secret = server.get("/v1/webhook-secret").json()["secret"]
    assert len(heard.calls) == 3, "a redirect is not followed"
    for headers, body in heard.calls:
        assert headers["webhook-id"] == job["id"]
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        key = base64.b64decode(secret.removeprefix("whsec_"))
        expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
        assert headers["webhook-signature"] == f"v1,{expected}"
        told_job = json.loads(body)
        assert told_job["type"] == "job.succeeded"
        assert told_job["data"]["id"] == job["id"]
        assert len(told_job["data"]["images"]) == 1


def test_a_webhook_that_nobody_hears_is_given_up_and_the_job_stays(
    denoiser: Denoiser, encoder: Any, tmp_path: Path
) -> None:
    with receiver(500, 500, 500) as heard, small(denoiser, encoder, jobs=config(tmp_path)) as server:
        job = submit(server, webhook_url=heard.url)
        until(lambda: server.get(f"/v1/jobs/{job['id']}").json()["webhook"] == "failed")
        assert ended(server, job["id"])["status"] == "succeeded"
        assert len(heard.calls) == 3


def test_a_webhook_that_its_replica_did_not_send_is_sent_by_another(
    denoiser: Denoiser, encoder: Any, tmp_path: Path
) -> None:
    with receiver(500) as heard:
        with small(denoiser, encoder, jobs=config(tmp_path, webhook_pauses_s=(3600,))) as stopping:
            job = submit(stopping, webhook_url=heard.url)
            until(lambda: len(heard.calls) == 1)
        with small(denoiser, encoder, jobs=config(tmp_path)) as other:
            until(lambda: other.get(f"/v1/jobs/{job['id']}").json()["webhook"] == "delivered")
    assert [headers["webhook-id"] for headers, _ in heard.calls] == [job["id"]] * 2


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("ftp://example.org/", "an http or https URL"),
        ("file:///etc/passwd", "an http or https URL"),
        ("example.org", "an http or https URL"),
        ("http://user:password@example.org/", "no name and no password: what is sent is signed"),
        ("http://127.0.0.1/", "a host whose addresses are all public"),
        ("http://localhost:8265/", "a host whose addresses are all public"),
        ("http://[::1]/", "a host whose addresses are all public"),
        ("http://0x7f000001/", "a host whose"),
        ("http://169.254.169.254/latest/meta-data", "a host whose addresses are all public"),
        ("http://name.invalid/", "a host whose name is known"),
        ("http://[::ffff:10.0.0.1]/", "a host whose addresses are all public"),
    ],
)
def test_webhooks_go_to_public_addresses_only(
    denoiser: Denoiser, encoder: Any, tmp_path: Path, url: str, rule: str
) -> None:
    with pytest.raises(RequestError) as caught:
        asyncio.run(resolve(url, private=False))
    assert caught.value.param == "webhook_url"
    assert rule in str(caught.value)
    assert "password@" not in str(caught.value)


def test_a_job_with_a_webhook_that_goes_inside_is_refused(denoiser: Denoiser, encoder: Any, tmp_path: Path) -> None:
    with small(denoiser, encoder, jobs=config(tmp_path, webhook_private=False)) as server:
        refused = server.post("/v1/jobs", prompt="a", webhook_url="http://127.0.0.1:1/")
        assert refused.status_code == 400
        assert told(refused)["message"] == (
            "Invalid value for 'webhook_url'.\n"
            "  value:   'http://127.0.0.1:1/'\n"
            "  rule:    a host whose addresses are all public"
        )
        assert server.idle


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("0.0.0.0", False),  # noqa: S104
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("::", False),
        ("::ffff:127.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::808:808", True),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_each_key_has_a_secret_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("x" * 32)
    secrets = WebhookSecrets(path)
    assert len({secrets.of(None), secrets.of("a"), secrets.of("b")}) == 3
    assert WebhookSecrets(path).of("a") == secrets.of("a")
    path.write_text("short")
    with pytest.raises(ConfigError, match="too short"):
        WebhookSecrets(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        WebhookSecrets(tmp_path / "none")
