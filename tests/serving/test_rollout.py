"""What is said about a deployment: settings, ports, Serve's reports, the command line's client."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.commands.serve import checked_config, numbered
from serving.client import request_images
from serving.config import ServeConfig
from serving.errors import QueueFullError, RequestError, ServeError
from serving.model import pinned
from serving.rollout import api_url, check_port, failure, others
from training.errors import ConfigError, DarkroomError, UsageError

DASHBOARD = "http://127.0.0.1:8265"
NOTHING: dict[str, Any] = {"applications": {}, "proxies": {}}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"min_replicas": 3}, "min_replicas 3 must be at most max_replicas 2"),
        ({"max_replicas": 0}, "--max-replicas is not valid.\n  value:   0"),
        ({"port": 70000}, "--port is not valid.\n  value:   70000"),
        ({"batch": {"padded_rows": 3, "max_batch_rows": 8}}, "max_batch_rows 8 must be a multiple of padded_rows 3"),
        ({"batch": {"max_waiting_images": 4}}, "max_images_per_request 8 must be at most"),
        ({"limits": {"max_steps": 5}}, "default_steps 20 must be at most max_steps 5"),
        ({"deploy_timeout_s": 0}, "--timeout is not valid."),
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
            check_port(NOTHING, DASHBOARD, config)
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert "Address already in use" in str(caught.value)
    check_port(NOTHING, DASHBOARD, config)


def test_serve_keeps_the_port_that_it_started_with() -> None:
    running = {"applications": {"darkroom": {}}, "proxies": {}, "http_options": {"port": 8000}}
    check_port(running, DASHBOARD, ServeConfig(model="emoji", port=8000))
    with pytest.raises(ServeError, match="listens on port 8000 already"):
        check_port(running, DASHBOARD, ServeConfig(model="emoji", port=9000))


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


@pytest.fixture
def stranger() -> Iterator[str]:
    """A server that is no image endpoint."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(404)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_endpoint_that_is_none_is_named(stranger: str) -> None:
    with pytest.raises(ServeError, match="not an image endpoint") as caught:
        request_images(stranger, {"prompt": "a cat"})
    assert stranger in str(caught.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "ftp://x", "http://["])
def test_nobody_there_is_a_typed_error(url: str) -> None:
    with pytest.raises(DarkroomError, match="No endpoint answers there"):
        request_images(url, {"prompt": "a cat"})


def test_several_pictures_are_numbered() -> None:
    assert numbered(Path("a/out.png"), 1) == [Path("a/out.png")]
    assert numbered(Path("a/out.png"), 2) == [Path("a/out-0.png"), Path("a/out-1.png")]
