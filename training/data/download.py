"""Pictures from URLs that strangers wrote: limits on time, size, redirects and addresses; owners who say no are obeyed.

Proxies from the environment are not used: a proxy looks names up itself, and nobody here would see the address.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache

import httpcore
import httpx
from PIL import Image

from training.data.addresses import DEADLINE, AddressRefusedError, CheckedBackend, Resolve, resolve
from training.data.decode import FORMATS
from training.data.download_config import DownloadConfig
from training.data.entries import printable
from training.data.findings import Finding, RefusedError, Rule
from training.data.hosts import Hosts

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
_ASKS_FOR_REST = frozenset({429, 503})
_OPT_OUTS = frozenset({"noai", "noimageai"})
_SNIFFED_BYTES = 16
_KEPT_OPEN = 64
"""Connections that wait for a next picture from the same host, for a few seconds."""
_MAX_URL_LETTERS = 8192

Headers = Sequence[tuple[bytes, bytes]]
Refusal = Callable[[str], Finding | None]
"""Why a URL must not be asked, if so."""


def nobody(_url: str) -> Finding | None:
    """Every URL may be asked."""
    return None


class _TransientError(Exception):
    """Another attempt may end better."""

    def __init__(self, finding: Finding, rest_s: float | None = None) -> None:
        super().__init__(finding.detail)
        self.finding = finding
        self.rest_s = rest_s


def checked_url(text: str) -> httpx.URL:
    """A URL that may be asked.

    Raises:
        RefusedError: it is no http or https URL, or carries a name and password.
    """
    if len(text) > _MAX_URL_LETTERS:
        raise _refused("bad_url", f"longer than {_MAX_URL_LETTERS} letters")
    try:
        url = httpx.URL(text)
        host = url.host  # says what is wrong with an international name, and httpcore with a port
        httpcore.URL(str(url))
    except (httpx.InvalidURL, ValueError) as error:
        raise _refused("bad_url", f"not a URL: {error}") from error
    if url.scheme not in {"http", "https"} or not host:
        raise _refused("bad_url", f"only http and https with a host are asked, not {url.scheme or 'a bare path'}"[:200])
    if url.userinfo:
        raise _refused("bad_url", "a URL with a name or password in it is not asked")
    return url.copy_with(fragment=None)


def opted_out(headers: Headers) -> bool:
    """Whether ``X-Robots-Tag`` says ``noai`` or ``noimageai``, to any robot.

    The header may come several times, list several directives, and name a robot before them; an owner who says it to
    one robot has said it.
    """
    tags = [value.decode("latin-1") for name, value in headers if name.lower() == b"x-robots-tag"]
    words = {word.rpartition(":")[2].strip().lower() for tag in tags for word in tag.split(",")}
    return bool(words & _OPT_OUTS)


def is_picture(start: bytes) -> bool:
    """Whether bytes begin as one of the formats that are read, whatever the server calls them."""
    Image.init()
    accepts = (Image.OPEN[name][1] for name in FORMATS)
    # a decoder may answer with a word of warning instead of yes
    return any(accept is None or accept(start[:_SNIFFED_BYTES]) is True for accept in accepts)


class Downloader:
    """One pool of connections, used from many threads."""

    def __init__(self, config: DownloadConfig, lookup: Resolve = resolve) -> None:
        self._config = config
        self._hosts = Hosts(config.per_host)
        self._pool = httpcore.ConnectionPool(
            ssl_context=httpx.create_ssl_context(),
            max_connections=None,
            max_keepalive_connections=_KEPT_OPEN,
            keepalive_expiry=10.0,
            network_backend=CheckedBackend(config.allow_networks, lookup),
        )

    def get(self, text: str, max_bytes: int, refusal: Refusal = nobody) -> bytes:
        """The picture at a URL.

        Args:
            text: the URL.
            max_bytes: of the picture.
            refusal: asked about the URL and each that it redirects to, before the host is.

        Raises:
            RefusedError: why it was not had.
        """
        url = checked_url(text)
        token = DEADLINE.set(time.monotonic() + self._config.total_timeout_s)
        try:
            for attempt in itertools.count():
                try:
                    return self._follow(url, max_bytes, refusal)
                except _TransientError as error:
                    wait = self._config.retry_wait_s * 2**attempt if error.rest_s is None else error.rest_s
                    if attempt >= self._config.retries or not self._may_wait(wait):
                        raise RefusedError(error.finding) from error
                time.sleep(wait)
        finally:
            DEADLINE.reset(token)
        raise _refused("download_failed", "no attempt was left")

    def close(self) -> None:
        """Close its connections."""
        self._pool.close()

    def _may_wait(self, seconds: float) -> bool:
        return seconds <= self._config.max_retry_after_s and time.monotonic() + seconds < DEADLINE.get()

    def _follow(self, url: httpx.URL, max_bytes: int, refusal: Refusal) -> bytes:
        for _ in range(self._config.max_redirects + 1):
            finding = refusal(str(url))
            if finding is not None:
                raise RefusedError(finding)
            with self._hosts.slot(url.host) as waited_s:
                DEADLINE.set(DEADLINE.get() + waited_s)  # waiting for one's turn costs no time
                try:
                    answer = self._ask(url, max_bytes)
                except _TransientError as error:
                    if error.rest_s is not None and error.rest_s <= self._config.max_retry_after_s:
                        self._hosts.pause(url.host, error.rest_s)
                    raise
            if isinstance(answer, bytes):
                return answer
            url = answer
        limit = self._config.max_redirects
        raise RefusedError(Finding("too_many_redirects", limit + 1, limit, f"still redirected after {limit}"))

    def _ask(self, url: httpx.URL, max_bytes: int) -> bytes | httpx.URL:
        """The body, or where the server sends us instead."""
        config = self._config
        timeouts = {"connect": config.connect_timeout_s, "read": config.read_timeout_s, "write": config.read_timeout_s}
        headers = [
            ("Host", url.netloc.decode("ascii")),
            ("User-Agent", config.user_agent),
            ("Accept", "image/*"),
            ("Accept-Encoding", "identity"),  # nothing is unpacked here, so nothing can unpack into a bomb
        ]
        try:
            with self._pool.stream("GET", str(url), headers=headers, extensions={"timeout": timeouts}) as response:
                if config.obey_noai and opted_out(response.headers):
                    raise _refused("opted_out_noai", "its owner says so in X-Robots-Tag")
                if response.status in _REDIRECTS:
                    return _next(url, response.headers)
                _require_success(response.status, response.headers)
                return _body(response, max_bytes)
        except AddressRefusedError as error:
            raise _refused("address_refused", str(error)) from error
        except httpcore.TimeoutException as error:
            over = time.monotonic() >= DEADLINE.get()
            limit = config.total_timeout_s if over else config.read_timeout_s
            finding = Finding("download_timeout", None, limit, printable(str(error))[:200] or "no answer in time")
            if over:
                raise RefusedError(finding) from error
            raise _TransientError(finding) from error
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise _TransientError(Finding("download_failed", detail=printable(str(error))[:200])) from error


def _header(headers: Headers, name: bytes) -> str:
    return next((value.decode("latin-1").strip() for key, value in headers if key.lower() == name), "")


def _next(url: httpx.URL, headers: Headers) -> httpx.URL:
    location = _header(headers, b"location")
    if not location:
        raise _refused("download_failed", "redirected to nowhere")
    try:
        target = str(url.join(location))
    except (httpx.InvalidURL, ValueError) as error:
        raise _refused("bad_url", f"redirected to what is not a URL: {error}") from error
    return checked_url(target)


def _require_success(status: int, headers: Headers) -> None:
    if status == httpx.codes.OK:
        encoding = _header(headers, b"content-encoding").lower()
        if encoding not in {"", "identity"}:
            raise _refused("download_failed", f"compressed on the way although not asked to: {encoding}")
        return
    finding = Finding("download_failed", status, None, f"the server says {status}")
    if status in _TRANSIENT:
        raise _TransientError(finding, _retry_after_s(headers) if status in _ASKS_FOR_REST else None)
    raise RefusedError(finding)


def _retry_after_s(headers: Headers) -> float | None:
    """What ``Retry-After`` asks for: seconds, or a date; None where it says neither."""
    text = _header(headers, b"retry-after")
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        when = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _body(response: httpcore.Response, max_bytes: int) -> bytes:
    said = _header(response.headers, b"content-length")
    if said.isascii() and said.isdigit() and int(said[:18]) > max_bytes:
        raise _too_large(int(said[:18]), max_bytes, "the server says that it is larger")
    data = bytearray()
    sniffed = False
    for chunk in response.iter_stream():
        data += chunk
        if len(data) > max_bytes:
            raise _too_large(len(data), max_bytes, "stopped there")
        if not sniffed and len(data) >= _SNIFFED_BYTES:
            _require_picture(data, response.headers)
            sniffed = True
    if not sniffed:
        _require_picture(data, response.headers)
    return bytes(data)


def _require_picture(start: bytearray, headers: Headers) -> None:
    if not is_picture(bytes(start[:_SNIFFED_BYTES])):
        kind = printable(_header(headers, b"content-type"))
        raise _refused("not_a_picture", f"begins like no picture; the server calls it {kind or 'nothing'}")


def _too_large(size: int, limit: int, detail: str) -> RefusedError:
    return RefusedError(Finding("download_too_large", size, limit, detail))


def _refused(rule: Rule, detail: str) -> RefusedError:
    return RefusedError(Finding(rule, detail=printable(detail)[:200]))


@lru_cache(maxsize=4)
def _downloader(config: DownloadConfig, _process: int) -> Downloader:
    return Downloader(config)


def download(url: str, config: DownloadConfig, max_bytes: int, refusal: Refusal = nobody) -> bytes:
    """As ``Downloader.get``, through this process's own pool: connections do not survive a fork.

    Raises:
        RefusedError: why it was not had.
    """
    return _downloader(config, os.getpid()).get(url, max_bytes, refusal)
