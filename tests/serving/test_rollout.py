"""What is said about a deployment: settings, ports, Serve's reports, the command line's client."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.commands.generate import numbered
from cluster.commands.serve import checked_config, fitting_limits
from serving.client import Picture, request_images
from serving.config import PinnedModel, ServeConfig
from serving.errors import QueueFullError, RequestError, ServeError
from serving.model import load_model, pinned
from serving.rollout import api_url, await_answer, check_listener, failure, others, refuse_failed
from training.bundle import Provenance, manifest_sha256, write_bundle
from training.canvas import Canvas
from training.conditioning import TextConfig, TextEncoder
from training.errors import ConfigError, DarkroomError, UsageError
from training.models import UNetConfig
from training.objectives import RectifiedFlow

DASHBOARD = "http://127.0.0.1:8265"
NOTHING: dict[str, Any] = {"applications": {}, "proxies": {}}
TINY = UNetConfig(resolution=8, widths=(8, 16), attention=(False, True), head_width=8, norm_groups=4)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"min_replicas": 3}, "min_replicas 3 must be at most max_replicas 2"),
        ({"max_replicas": 0}, "--max-replicas is not valid.\n  value:   0"),
        ({"port": 70000}, "--port is not valid.\n  value:   70000"),
        ({"batch": {"padded_rows": 9, "max_batch_rows": 8}}, "padded_rows 9 must be at most max_batch_rows 8"),
        ({"batch": {"max_waiting_images": 4}}, "max_images_per_request 8 must be at most"),
        ({"limits": {"max_steps": 5}}, "default_steps 20 must be at most max_steps 5"),
        ({"deploy_timeout_s": 0}, "--timeout is not valid."),
        ({"graceful_shutdown_timeout_s": -1}, "--drain-timeout is not valid."),
        ({"replicas": 3}, "--replicas is not valid."),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked_config({"model": "emoji", **settings})
    assert text in str(caught.value)


def test_a_port_that_somebody_else_holds_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        config = ServeConfig(model="emoji", port=port)
        with pytest.raises(ServeError) as caught:
            check_listener(NOTHING, DASHBOARD, config)
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert "Address already in use" in str(caught.value)
    check_listener(NOTHING, DASHBOARD, config)


@pytest.mark.parametrize("location", ["HeadOnly", "EveryNode"])
def test_serve_keeps_the_address_that_it_started_with(location: str) -> None:
    http = {"host": "127.0.0.1", "port": 8000}
    running = {"applications": {"chat": {}}, "proxies": {}, "http_options": http, "proxy_location": location}
    check_listener(running, DASHBOARD, ServeConfig(model="emoji", port=8000))
    for other in ({"port": 9000}, {"port": 8000, "host": "0.0.0.0"}):  # noqa: S104
        with pytest.raises(ServeError, match=r"listens on 127\.0\.0\.1:8000 already") as caught:
            check_listener(running, DASHBOARD, ServeConfig(model="emoji", **other))
        assert "--host 127.0.0.1 --port 8000" in str(caught.value)
    disabled = {**running, "proxy_location": "Disabled"}
    with pytest.raises(ServeError, match="Disabled"):
        check_listener(disabled, DASHBOARD, ServeConfig(model="emoji", port=8000))


def test_the_replicas_own_words_are_found_in_serves_report() -> None:
    message = (
        "Failed to update the deployments ['ImageServer']. Traceback (most recent call last):\n"
        "  File \"x.py\", line 1, in load\ntraining.errors.CheckpointError: A file is missing.\n  value:   'unet'\n"
    )
    assert failure({"deployments": {"ImageServer": {"message": message}}}) == "A file is missing.\n  value:   'unet'"
    assert failure({"deployments": {"ImageServer": {"message": ""}}, "message": ""}) is None


def test_other_applications_are_declared_again() -> None:
    theirs = {"name": "chat", "import_path": "chat:app"}
    details = {
        "applications": {
            "darkroom": {"deployed_app_config": {"name": "darkroom"}},
            "chat": {"deployed_app_config": theirs},
            "script": {"deployed_app_config": None},
        }
    }
    assert others(details) == [theirs]


def test_a_wildcard_is_reached_on_the_dashboards_host() -> None:
    assert api_url("http://head:8265", ServeConfig(model="emoji", host="0.0.0.0", port=80)) == "http://head:80"  # noqa: S104
    assert api_url(DASHBOARD, ServeConfig(model="emoji")) == "http://127.0.0.1:8000"


@pytest.mark.parametrize("model", ["no/such/bundle", "emoji@champion", "../up"])
def test_what_no_registry_could_know_is_refused(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ServeError) as caught:
        pinned(ServeConfig(model=model))
    assert repr(model) in str(caught.value)
    assert "NAME@champion" in str(caught.value)


def test_errors_survive_a_process_border() -> None:
    import pickle

    wrong = RequestError(UsageError("Too long.", value="x"), param="prompt")
    again = pickle.loads(pickle.dumps(wrong))  # noqa: S301
    assert (str(again), again.param) == (str(wrong), "prompt")
    full = pickle.loads(pickle.dumps(QueueFullError(3, 2, 7)))  # noqa: S301
    assert (full.waiting, full.limit, full.retry_after_s) == (3, 2, 7)


@dataclass
class Web:
    """A web server that says the same to everybody."""

    url: str
    status: int = 404
    body: bytes = b"<html>"


@pytest.fixture
def web() -> Iterator[Web]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(web.status)
            self.end_headers()
            self.wfile.write(web.body)

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    web = Web(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield web
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, b"<html>"),
        (200, b"<html>"),
        (200, b"\xff"),
        (200, b'{"data": []'),
        (200, b'{"created": 1, "data": [{"b64_json": "aGk=", "revised_prompt": null}]}'),
    ],
)
def test_an_endpoint_that_is_none_is_named(web: Web, status: int, body: bytes) -> None:
    web.status, web.body = status, body
    with pytest.raises(ServeError, match="not an image endpoint") as caught:
        request_images(web.url, {"prompt": "a cat"})
    assert f"{web.url}: {status}" in str(caught.value)


PINNED = PinnedModel(name="emoji", version=3, sha256="a" * 64)


def readiness(**fields: object) -> bytes:
    said = {"status": "ready", "model": "emoji/3", "bundle_sha256": "a" * 64, "running_images": 0, "waiting_images": 0}
    return json.dumps({**said, **fields}).encode()


@pytest.mark.parametrize("proxy", ["http_proxy", "all_proxy"])
def test_proxies_of_the_environment_are_not_asked_for_this_machine(
    web: Web, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(proxy, "http://127.0.0.1:1")
    web.status, web.body = 200, b'{"data": [{"seed": 1, "b64_json": "aGk="}]}'
    assert request_images(web.url, {"prompt": "a cat"}) == [Picture(seed=1, file=b"hi")]
    web.body = readiness()
    await_answer(web.url, ServeConfig(model="emoji/3", pinned=PINNED), time.monotonic() + 20, lambda: None)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, readiness(bundle_sha256="b" * 64)),
        (200, readiness(model="emoji/2")),
        (503, readiness()),
        (200, b"<html>"),
        (200, b"{}"),
    ],
)
def test_only_the_weights_that_were_deployed_count_as_an_answer(web: Web, status: int, body: bytes) -> None:
    web.status, web.body = status, body
    config = ServeConfig(model="emoji/3", pinned=PINNED)
    looks: list[int] = []

    def check() -> None:
        looks.append(1)
        if len(looks) > 1:
            refuse_failed({"status": "UNHEALTHY", "message": "no GPU"}, config.model)

    with pytest.raises(ServeError, match=r"emoji/3 could not be deployed. no GPU"):
        await_answer(web.url, config, time.monotonic() + 20, check)
    with pytest.raises(ServeError, match=f"does not answer(.*\n)*.*last: {status} "):
        await_answer(web.url, config, time.monotonic() + 0.05, lambda: None)
    web.status, web.body = 200, readiness()
    await_answer(web.url, config, time.monotonic() + 20, lambda: None)


def test_a_failed_application_is_not_waited_for() -> None:
    words = "ray.exceptions.RayTaskError: x\nserving.errors.ServeError: No GPU."
    broken = {"deployments": {"ImageServer": {"message": words}}}
    with pytest.raises(ServeError, match=r"emoji could not be deployed. No GPU."):
        refuse_failed({"status": "DEPLOYING", **broken}, "emoji")
    refuse_failed({"status": "RUNNING", **broken}, "emoji")
    refuse_failed({}, "emoji")


@pytest.mark.parametrize(
    ("steps", "waiting", "limits"), [(10, 64, (10, 10, 8)), (100, 4, (100, 20, 4)), (100, 64, (100, 20, 8))]
)
def test_defaults_that_nobody_chose_give_way(steps: int, waiting: int, limits: tuple[int, int, int]) -> None:
    settings = {"model": "emoji", "batch": {"max_waiting_images": waiting}, "limits": fitting_limits(steps, waiting)}
    chosen = checked_config(settings).limits
    assert (chosen.max_steps, chosen.default_steps, chosen.max_images_per_request) == limits


def test_a_limit_that_is_none_is_named_as_its_option() -> None:
    with pytest.raises(ConfigError, match="--max-steps is not valid"):
        checked_config({"model": "emoji", "limits": fitting_limits(0, 64)})


def tiny_bundle(out: Path, seed: int = 0) -> Path:
    encoder = TextEncoder.from_config(TextConfig())
    torch.manual_seed(seed)
    provenance = Provenance(
        run_id="run", data_hash="data", recipe={}, created_utc="2026-01-01T00:00:00Z", step=1, code_version="test"
    )
    unet = TINY.build(encoder.shape)
    return write_bundle(
        out,
        network=unet,
        encoder=encoder,
        objective=RectifiedFlow(),
        canvas=Canvas(8),
        provenance=provenance,
    )


def test_a_directory_is_pinned_by_its_contents(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "tiny")
    first = pinned(ServeConfig(model=str(bundle)))
    assert first == pinned(ServeConfig(model=str(bundle)))
    loaded = load_model(first).card
    assert first.pinned == PinnedModel(name="tiny", version=None, sha256=loaded.bundle_sha256)
    tiny_bundle(bundle, seed=1)
    assert pinned(ServeConfig(model=str(bundle))) != first, "Serve acts on arguments that differ"
    with pytest.raises(ServeError, match="has changed since it was deployed") as caught:
        load_model(first)
    assert str(bundle) in str(caught.value)
    with pytest.raises(ServeError, match="not pinned"):
        load_model(ServeConfig(model=str(bundle)))


def test_a_cached_bundle_loads_while_the_registry_is_away(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "tiny")
    sha256 = manifest_sha256(bundle)
    bundle.rename(tmp_path / f"emoji-3-{sha256[:16]}")
    config = ServeConfig(
        model="emoji/3",
        pinned=PinnedModel(name="emoji", version=3, sha256=sha256),
        tracking_uri="http://127.0.0.1:1",
        cache=str(tmp_path),
    )
    card = load_model(config).card
    assert (card.names, card.bundle_sha256) == (("emoji", "emoji/3"), sha256)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "ftp://x", "http://["])
def test_nobody_there_is_a_typed_error(url: str) -> None:
    with pytest.raises(DarkroomError, match="No endpoint answers there"):
        request_images(url, {"prompt": "a cat"})


def test_several_pictures_are_numbered() -> None:
    assert numbered(Path("a/out.png"), 1) == [Path("a/out.png")]
    assert numbered(Path("a/out.png"), 2) == [Path("a/out-0.png"), Path("a/out-1.png")]
