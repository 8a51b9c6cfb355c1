"""Clients that do not send, or do not read: they are left, and hold little meanwhile."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from serving.admission_config import AdmissionConfig
from serving.slow_clients import PIECE_BYTES, SlowClients
from tests.serving.live_server import serving
from tests.serving.small import small
from training.objectives import Denoiser

LARGE = 32 * 2**20
"""More than any socket's buffers hold."""


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def test_a_body_that_does_not_come_is_a_408_in_the_envelope(denoiser: Denoiser, encoder: Any) -> None:
    admission = AdmissionConfig(stall_s=0.2)
    with small(denoiser, encoder, admission=admission) as server, connect(server.port) as slow:
        slow.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b'Content-Length: 1000\r\n\r\n{"prompt": "'
        )
        answer = slow.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"body_too_slow"' in answer
    assert b"Nothing of the body came for 0.2 s" in answer


def test_a_reader_that_does_not_read_counts_as_gone_and_holds_a_piece_at_a_time() -> None:
    pieces: list[int] = []
    left = threading.Event()

    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        await receive()

        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(LARGE)})
        assert (await receive())["type"] == "http.disconnect"
        left.set()

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            await send(message)
            pieces.append(len(message.get("body", b"")))

        await SlowClients(large, 0.2)(scope, receive, counting)

    with serving(counted) as port, connect(port) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert left.wait(20)
    assert max(pieces) == PIECE_BYTES
    assert sum(pieces) < LARGE, "the rest was never handed over"


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 5 * PIECE_BYTES])
def test_a_reader_that_reads_gets_every_byte(size: int) -> None:
    body = bytes(number % 251 for number in range(size))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = [(b"content-length", str(size).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    with serving(SlowClients(app, 20)) as port, connect(port) as reader:
        reader.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        came = b""
        while part := reader.recv(65536):
            came += part
    assert came.partition(b"\r\n\r\n")[2] == body
