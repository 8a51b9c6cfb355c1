"""What a replica could not finish, another one does; the client sees one answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx
import pytest
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from serving import beside, proxy_tries, seeds
from serving.behind_proxy import BehindProxy
from serving.candidate import PATH, CandidateConfig
from serving.proxy import Envelopes
from serving.proxy_request import Memory, Request
from serving.proxy_tries import MAX_TRIES, Tries

MAKE = "/v1/images/generations"
Replica = Callable[[Scope, bytes, Send], Awaitable[None]]
"""Told the request and its body."""


class Proxy:
    """Serve's proxy as far as the middleware can tell: one replica after the other, and a table of routes."""

    def __init__(self, replicas: Sequence[Replica], routes: Sequence[str] = ("/",)) -> None:
        self.replicas = list(replicas)
        self.routes = list(routes)
        self.paths: list[str] = []
        self.seeds: list[str] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/-/routes":
            await say(send, 200, json.dumps(dict.fromkeys(self.routes, "app")).encode())
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.paths.append(scope["path"])
        self.seeds.append(Headers(scope=scope).get(seeds.HEADER, ""))
        self.bodies.append(body)
        await (self.replicas.pop(0) if len(self.replicas) > 1 else self.replicas[0])(scope, body, send)


async def say(send: Send, status: int, body: bytes, kind: str = "application/json") -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind.encode())]})
    await send({"type": "http.response.body", "body": body})


async def good(_: Scope, body: bytes, send: Send) -> None:
    await say(send, 200, body)


async def dies(_: Scope, __: bytes, ___: Send) -> None:
    """What Serve's proxy does when a replica dies: it returns."""


async def dies_after_its_head(_: Scope, __: bytes, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


async def stopping(_: Scope, __: bytes, send: Send) -> None:
    await say(send, 503, b'{"error": {"code": "engine_error"}}')


async def busy(_: Scope, __: bytes, send: Send) -> None:
    await say(send, 503, b'{"error": {"code": "queue_full"}}')


def streams(*events: str, then: str = "") -> Replica:
    """Events by id; ``then`` is how it ends: not at all, if it dies."""

    async def replica(_: Scope, __: bytes, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for event in events:
            body = f"id: {event}\ndata: {event}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        if then == "error":
            body = b'event: error\ndata: {"error": {"code": "engine_error"}}\n\n'
            await send({"type": "http.response.body", "body": body, "more_body": True})
        if then:
            await send({"type": "http.response.body", "body": b""})

    return replica


def ask(proxy: Proxy, times: int = 1, *, method: str = "POST", path: str = MAKE, body: bytes = b"{}") -> Any:
    """The answers to as many requests, one after the other, through what every proxy wraps itself in."""

    async def main() -> list[httpx.Response]:
        transport = httpx.ASGITransport(Envelopes(Tries(proxy)), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            return [await client.request(method, path, content=body) for _ in range(times)]

    answers = asyncio.run(main())
    return answers[0] if times == 1 else answers


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_tries, "PAUSE_S", 0.0)


@pytest.mark.parametrize("first", [dies, dies_after_its_head, stopping])
def test_another_replica_gets_the_same_request_and_the_same_seed(first: Replica) -> None:
    proxy = Proxy([first, good])
    answer = ask(proxy, body=b"a prompt")
    assert (answer.status_code, answer.content) == (200, b"a prompt")
    assert proxy.bodies == [b"a prompt", b"a prompt"]
    assert proxy.seeds[0] == proxy.seeds[1]
    assert 0 <= int(proxy.seeds[0]) < seeds.LIMIT


def test_every_request_has_a_seed_of_its_own_whatever_its_client_says() -> None:
    proxy = Proxy([good])
    ask(proxy, 3)
    assert len(set(proxy.seeds)) == 3

    async def main() -> None:
        transport = httpx.ASGITransport(Tries(proxy))
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            await client.post(MAKE, headers={seeds.HEADER: "nonsense"})

    asyncio.run(main())
    assert proxy.seeds[-1].isdigit()


@pytest.mark.parametrize(
    ("first", "rest"),
    [
        (streams("0.0", "0.1"), streams("0.0", "0.1", "0.image", then="end")),
        (streams("0.0", "0.1", then="error"), streams("0.0", "0.1", "0.image", then="end")),
        (streams(), streams("0.0", "0.1", "0.image", then="end")),
    ],
)
def test_a_stream_goes_on_where_it_broke_off(first: Replica, rest: Replica) -> None:
    answer = ask(Proxy([first, rest]))
    assert answer.status_code == 200
    assert [line for line in answer.text.splitlines() if line.startswith("id")] == ["id: 0.0", "id: 0.1", "id: 0.image"]
    assert "error" not in answer.text


def test_a_stream_that_nobody_can_go_on_with_ends_with_an_error() -> None:
    lost = ask(Proxy([streams("0.0")])).text
    assert lost.endswith("\n\n")
    assert lost.count("id: 0.0") == 1
    assert json.loads(lost.rpartition("data: ")[2])["error"]["code"] == "replica_lost"
    refused = ask(Proxy([streams("0.0"), busy])).text
    assert json.loads(refused.rpartition("data: ")[2])["error"]["code"] == "queue_full"
    assert refused.count("event: error") == 1


def test_what_is_refused_is_refused_and_not_tried_elsewhere() -> None:
    proxy = Proxy([busy, good])
    assert ask(proxy).status_code == 503
    assert len(proxy.paths) == 1


def test_a_request_that_kills_every_replica_ends() -> None:
    proxy = Proxy([dies])
    answer = ask(proxy)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replica_lost")
    assert answer.headers["retry-after"] == "1"
    assert len(answer.headers["x-request-id"]) == 32
    assert len(proxy.paths) == MAX_TRIES
    proxy = Proxy([stopping])
    assert ask(proxy).json()["error"]["code"] == "engine_error"
    assert len(proxy.paths) == MAX_TRIES


@pytest.mark.parametrize(
    ("method", "path", "tries"),
    [("GET", "/v1/models", 2), ("GET", "/beside/page", 1), ("POST", "/beside/buy", 1), ("POST", "/v1/jobs", 1)],
)
def test_only_what_changes_nothing_is_asked_twice(method: str, path: str, tries: int) -> None:
    proxy = Proxy([dies, good])
    ask(proxy, method=method, path=path)
    assert len(proxy.paths) == tries


def test_a_body_for_which_there_is_no_memory_is_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_tries, "KEPT_BYTES", 10)
    proxy = Proxy([dies, good])
    assert ask(proxy, body=b"eleven byte").status_code == 503
    assert len(proxy.paths) == 1
    proxy = Proxy([dies, good])
    answers = ask(proxy, 3, body=b"ten bytes!")
    assert [answer.status_code for answer in answers] == [200, 200, 200], "the memory is free again"


def test_nobody_tries_again_for_a_client_that_left() -> None:
    tries = 0

    async def replica(scope: Scope, receive: Receive, _: Send) -> None:
        nonlocal tries
        if scope["path"] != MAKE:  # the table of routes, of which this proxy cannot tell yet
            return
        tries += 1
        while (await receive())["type"] != "http.disconnect":
            continue

    async def main() -> None:
        messages: list[Message] = [{"type": "http.request", "body": b""}, {"type": "http.disconnect"}]

        async def receive() -> Message:
            return messages.pop(0)

        async def send(_: Message) -> None:
            raise AssertionError("nobody is there")

        scope = {"type": "http", "method": "POST", "path": MAKE, "headers": []}
        await Tries(replica)(scope, receive, send)

    asyncio.run(main())
    assert tries == 1


@pytest.mark.parametrize(("said", "patience"), [("2.5", 2.5), ("nan", 600), ("-1", 600), ("1e9", 600), ("x", 600)])
def test_a_client_says_how_long_it_waits(said: str, patience: float) -> None:
    scope = {"path": MAKE, "method": "POST", "headers": [(b"x-stainless-read-timeout", said.encode())]}

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    assert Request(scope, receive, Memory(1)).patience_s == patience


CANARY = CandidateConfig(sha256="0" * 12, kind="canary", percent=25, max_error_rate=0.1, min_requests=4)


def candidate_s(paths: Sequence[str]) -> list[bool]:
    return [path == f"{CANARY.route}{MAKE}" for path in paths]


def test_a_route_says_which_candidate_it_is() -> None:
    for percent in (0.1, 100 / 3, 100):
        trial = CANARY.model_copy(update={"percent": float(percent)})
        assert CandidateConfig.from_route(trial.route) == trial
    for route in ("/", PATH, f"{PATH}/{'0' * 12}", f"{CANARY.route}/x", CANARY.route.replace("canary", "bird")):
        assert CandidateConfig.from_route(route) is None


def test_a_canary_answers_its_share_evenly() -> None:
    proxy = Proxy([good], ["/", CANARY.route])
    assert all(answer.status_code == 200 for answer in ask(proxy, 12))
    assert candidate_s(proxy.paths) == 3 * [False, False, False, True]
    ask(proxy, 4, path="/v1/jobs")
    assert not any(candidate_s(proxy.paths[12:]))


@pytest.mark.parametrize("answers", [dies, stopping, streams("0.0"), streams("0.0", then="error"), busy])
def test_what_a_canary_cannot_answer_the_model_that_serves_does(answers: Replica) -> None:
    trial = CANARY.model_copy(update={"percent": 100.0})

    async def by_path(scope: Scope, body: bytes, send: Send) -> None:
        main = streams("0.image", then="end") if answers not in {dies, stopping, busy} else good
        await (answers if scope["path"].startswith(PATH) else main)(scope, body, send)

    proxy = Proxy([by_path], ["/", trial.route])

    async def main() -> tuple[list[httpx.Response], Any]:
        transport = httpx.ASGITransport(Tries(proxy))
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            return [await client.post(MAKE) for _ in range(6)], (await client.get(PATH)).json()

    responses, (measured,) = asyncio.run(main())
    assert [each.status_code for each in responses] == [200] * 6
    assert not any("error" in each.text for each in responses)
    asked = sum(path.startswith(PATH) for path in proxy.paths)
    if answers is busy:
        assert (asked, measured["refused"], measured["errors"], measured["stopped"]) == (6, 6, 0, False)
    else:
        assert (asked, measured["requests"], measured["errors"], measured["stopped"]) == (4, 4, 4, True)


def test_a_shadow_works_on_copies_and_answers_nobody() -> None:
    trial = CANARY.model_copy(update={"kind": "shadow", "percent": 50.0})

    async def by_path(scope: Scope, body: bytes, send: Send) -> None:
        await (stopping if scope["path"].startswith(PATH) else good)(scope, body, send)

    proxy = Proxy([by_path], ["/", trial.route])

    async def main() -> Any:
        tries = Tries(proxy)
        transport = httpx.ASGITransport(tries)
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            answers = [await client.post(MAKE, content=str(number)) for number in range(4)]
            assert [each.text for each in answers] == ["0", "1", "2", "3"]
            while (measured := (await client.get(PATH)).json()[0])["requests"] < 2:
                await asyncio.sleep(0)
            return measured, tries

    measured, tries = asyncio.run(main())
    assert (measured["errors"], measured["skipped"]) == (2, 0)
    copies = [number for number, path in enumerate(proxy.paths) if path.startswith(PATH)]
    assert [proxy.bodies[number] for number in copies] == [b"1", b"3"]
    assert all(proxy.seeds[number] in proxy.seeds[:number] for number in copies)
    assert tries._memory.kept_bytes == 0


def test_a_replica_draws_the_proxy_s_seed_and_sees_no_prefix() -> None:
    drawn: list[int] = []

    async def application(scope: Scope, _: Receive, send: Send) -> None:
        drawn.append(seeds.draw_seed())
        await say(send, 200, f"{scope['root_path']}{scope['path']}".encode())

    async def asked(path: str, root: str, said: str) -> str:
        transport = httpx.ASGITransport(BehindProxy(application), root_path=root)
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            return (await client.post(path, headers={seeds.HEADER: said})).text

    async def main() -> None:
        assert await asked(f"{CANARY.route}{MAKE}", CANARY.route, "7") == MAKE
        assert await asked(MAKE, "", str(seeds.LIMIT - 1)) == MAKE
        await asked(MAKE, "", str(seeds.LIMIT))
        await asked(MAKE, "", "x")

    asyncio.run(main())
    assert drawn[:2] == [7, seeds.LIMIT - 1]
    assert len(set(drawn)) == 4
    assert seeds.draw_seed() != drawn[0]


CATS = f"{beside.PATH}/cats"


@pytest.mark.parametrize(
    ("path", "kind", "body", "prefix"),
    [
        (MAKE, "application/json", b'{"model": "cats/2", "prompt": "a"}', CATS),
        (MAKE, "application/json", b'{"model": "dogs"}', ""),
        (MAKE, "application/json", b"not JSON", ""),
        (MAKE, "application/json", b"[]", ""),
        ("/sdapi/v1/txt2img", "application/json", b'{"override_settings": {"sd_model_checkpoint": "cats [0]"}}', CATS),
        ("/v1/images/edits", "multipart/form-data", b'--x\r\nname="model"\r\n\r\ncats\r\n--x--', CATS),
        ("/v1/models/cats/2", "", b"", CATS),
        ("/v1/models/dogs", "", b"", ""),
    ],
)
@pytest.mark.parametrize("first", [good, dies])
def test_a_request_chooses_its_model(path: str, kind: str, body: bytes, prefix: str, first: Replica) -> None:
    heard: list[str | None] = []

    async def replica(scope: Scope, came: bytes, send: Send) -> None:
        heard.append(Headers(scope=scope).get(beside.HEADER))
        await say(send, 200, came)

    proxy = Proxy([first, replica], ["/", CATS]) if first is dies else Proxy([replica], ["/", CATS])

    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(Tries(proxy))
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            method = "GET" if path.startswith("/v1/models") else "POST"
            return await client.request(method, path, content=body, headers={"content-type": kind})

    assert asyncio.run(main()).content == body
    assert set(proxy.paths) == {f"{prefix}{path}"}
    assert heard == ["cats"]


def test_all_models_are_listed() -> None:
    async def replica(scope: Scope, _: bytes, send: Send) -> None:
        name = "cats" if scope["path"].startswith(CATS) else "main"
        await say(send, 200, json.dumps({"object": "list", "data": [{"id": name}]}).encode())

    answer = ask(Proxy([replica], ["/", CATS]), method="GET", path="/v1/models")
    assert answer.json() == {"object": "list", "data": [{"id": "main"}, {"id": "cats"}]}
