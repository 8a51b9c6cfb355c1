"""A real HTTP server that behaves in all the ways that strangers' servers do."""

from __future__ import annotations

import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit


class Strangers(ThreadingHTTPServer):
    """What the server saw, and what its handlers share."""

    daemon_threads = True

    def __init__(self, address: str, picture: bytes) -> None:
        super().__init__((address, 0), _Handler)
        self.picture = picture
        self.asked: Counter[str] = Counter()
        self.hosts: list[str] = []
        self.agents: set[str] = set()
        self.over = threading.Event()
        self.together = threading.Barrier(2)
        self.active = 0
        self.most_active = 0
        self.lock = threading.Lock()

    def url(self, path: str, scheme: str = "http") -> str:
        return f"{scheme}://{self.server_address[0]!s}:{self.server_port}{path}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Strangers
    TAGS: ClassVar[dict[str, list[str]]] = {
        "/noai": ["noai"],
        "/list": ["noindex, NoImageAI"],
        "/agent": ["otherbot: noai"],
        "/second": ["noindex", "nofollow, noai"],
        "/fine": ["noindex, max-snippet: 20", "unavailable_after: 25 Jun 2030 15:00:00 GMT"],
    }

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Tests print nothing."""

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        with self.server.lock:
            self.server.asked[split.path] += 1
            self.server.hosts.append(self.headers["Host"])
            self.server.agents.add(self.headers["User-Agent"])
            self.server.active += 1
            self.server.most_active = max(self.server.most_active, self.server.active)
        try:
            with suppress(ConnectionError):
                self._answer(split.path, parse_qs(split.query))
        finally:
            with self.server.lock:
                self.server.active -= 1

    def _say(self, status: int = 200, body: bytes | None = None, **headers: str) -> None:
        body = self.server.picture if body is None else body
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), "Content_Type": "text/plain", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _answer(self, path: str, query: dict[str, list[str]]) -> None:
        picture, times = self.server.picture, self.server.asked[path]
        match PurePosixPath(path).stem:
            case "redirect":
                self._say(302, b"", Location=query["to"][0])
            case "loop":
                self._say(301, b"", Location="/loop")
            case "nowhere":
                self._say(302, b"")
            case "noai" | "list" | "agent" | "second" | "fine":
                self.send_response(200)
                for tag in self.TAGS[path]:
                    self.send_header("X-Robots-Tag", tag)
                self.send_header("Content-Length", str(len(picture)))
                self.end_headers()
                self.wfile.write(picture)
            case "missing":
                self._say(404, b"gone")
            case "broken":
                self._say(500, b"broken")
            case "html":
                self._say(200, b"<!doctype html><title>Not found</title>", Content_Type="image/png")
            case "packed":
                self._say(200, picture, Content_Encoding="gzip")
            case "busy":
                self._say(
                    503, b"", **({} if query.get("plain") else {"Retry_After": "1"})
                ) if times == 1 else self._say()
            case "closed":
                self._say(429, b"", Retry_After="3600")
            case "short":
                self._say(Content_Length=str(len(picture) + 1000))
                self.close_connection = True
            case "short-once":
                self._say(**({"Content_Length": str(len(picture) + 1000)} if times == 1 else {}))
                self.close_connection = True
            case "huge":
                self._say(Content_Length=str(10**13))
                self.close_connection = True
            case "long":
                self._say(Content_Length=str(len(picture)))
                self.wfile.write(b"x" * 1000)
                self.close_connection = True
            case "silent":
                self.server.over.wait(30)
                self.close_connection = True
            case "drip" | "drip-headers" | "endless":
                self._pour(path)
            case "together":
                self.server.together.wait(30)
                self._say()
            case _:
                self._say()

    def _pour(self, path: str) -> None:
        """Until the client hangs up."""
        if path == "/drip-headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        else:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n" + self.server.picture[:20])
        while not self.server.over.wait(0.0 if path == "/endless" else 0.05):
            self.wfile.write(b"x" * (65536 if path == "/endless" else 1))
        self.close_connection = True


@contextmanager
def strangers(picture: bytes, address: str = "127.0.0.2", context: ssl.SSLContext | None = None) -> Iterator[Strangers]:
    server = Strangers(address, picture)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.together.abort()
        server.shutdown()
        thread.join()
        server.server_close()
