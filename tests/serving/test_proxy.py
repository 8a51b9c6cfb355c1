"""What Serve's proxy says by itself becomes an envelope; what applications say is left alone."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.proxy import CALLBACK, Envelopes, middlewares
from serving.proxy_tries import Tries

IDS = {"x-request-id": "req-1"}


def ask(app: ASGIApp, path: str = "/v1/images/generations") -> httpx.Response:
    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(Envelopes(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            return await client.post(path, headers=IDS)

    return asyncio.run(main())


async def silent(_: Scope, __: Receive, ___: Send) -> None:
    """What the proxy does when a replica dies: nothing."""


async def raising(_: Scope, __: Receive, ___: Send) -> None:
    raise ConnectionError("gone")


@pytest.mark.parametrize("app", [silent, raising])
@pytest.mark.parametrize("path", ["/v1/images/generations", "/readyz"])
def test_a_response_that_never_began_is_a_503(app: ASGIApp, path: str) -> None:
    answer = ask(app, path)
    assert (answer.status_code, answer.headers["retry-after"], answer.headers["x-request-id"]) == (503, "1", "req-1")
    assert answer.json()["error"]["code"] == "replica_lost"
    assert "gone\n" not in answer.text


@pytest.mark.parametrize(
    ("status", "headers", "code", "after"),
    [
        (503, {}, "unavailable", "1"),
        (429, {"retry-after": "7"}, "unavailable", "7"),
        (408, {}, "unavailable", "1"),
        (404, {}, "unknown_url", None),
    ],
)
def test_the_proxy_s_bare_text_is_an_envelope(status: int, headers: dict[str, str], code: str, after: Any) -> None:
    answer = ask(PlainTextResponse("Ping http://.../-/routes", status, headers=headers))
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"] == "req-1"
    assert answer.headers.get("retry-after") == after
    assert answer.json()["error"]["code"] == code
    assert "POST /v1/images/generations" in answer.json()["error"]["message"]
    assert "routes" not in answer.text


def test_what_applications_say_passes_unchanged() -> None:
    envelope = ask(JSONResponse({"error": {"code": "queue_full"}}, 429, headers={"retry-after": "9"}))
    assert (envelope.json(), envelope.headers["retry-after"]) == ({"error": {"code": "queue_full"}}, "9")
    assert ask(HTMLResponse("<b>theirs</b>", 500), "/beside").text == "<b>theirs</b>"
    assert ask(PlainTextResponse("fine")).text == "fine"


def test_a_response_that_breaks_off_is_not_answered_twice() -> None:
    async def breaking(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        ask(breaking)


def test_serve_is_told_where_the_middlewares_are() -> None:
    module, _, function = CALLBACK["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].rpartition(".")
    assert (module, function) == (middlewares.__module__, middlewares.__name__)
    assert [each.cls for each in middlewares()] == [Tries, Envelopes]
