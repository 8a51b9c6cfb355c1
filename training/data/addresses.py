"""Connections to addresses that were looked at first: strangers' URLs reach no machine behind the firewall."""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLate
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import httpcore

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], list[str]]

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_SPECIAL = tuple(
    ipaddress.ip_network(network)
    for network in (
        *("168.63.129.16", "192.0.0.0/24", "192.88.99.0/24"),
        *("2001::/23", "3fff::/20", "64:ff9b:1::/48", "fec0::/10"),
    )
)
"""Not on the open internet either, whatever Python's tables say: Azure's own service, relays, protocols' networks,
examples."""

_LOOKUPS = 32
"""Names that are looked up at once."""

DEADLINE: ContextVar[float] = ContextVar("deadline", default=float("inf"))
"""When the download that this thread is at must have ended, by the monotonic clock."""


class AddressRefusedError(Exception):
    """A name leads to an address that strangers' URLs may not reach; never leaves ``training.data``."""


def plain(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for (mapped, NAT64, 6to4), or the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def is_public(address: Address) -> bool:
    """Whether an address is on the open internet."""
    seen = plain(address)
    special = seen.is_private or seen.is_multicast or seen.is_reserved or seen.is_unspecified or seen.is_link_local
    return seen.is_global and not special and not any(seen in network for network in _SPECIAL)


def check(host: str, found: Iterable[str], allowed: Iterable[Network]) -> list[str]:
    """The addresses of a name, if all of them may be reached.

    Args:
        host: the name, for the message.
        found: its addresses, as the resolver says them.
        allowed: networks that may be reached although they are private.

    Raises:
        AddressRefusedError: one of them is not on the open internet, nor in ``allowed``.
    """
    addresses = list(dict.fromkeys(found))
    networks = tuple(allowed)
    for text in addresses:
        address = ipaddress.ip_address(text.partition("%")[0])
        if not is_public(address) and not any(plain(address) in network for network in networks):
            way = "" if host == text else f"{host} leads to "
            raise AddressRefusedError(f"{way}{text}, which is not on the open internet")
    return addresses


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a name, in the system's order.

    Raises:
        OSError: it has none.
    """
    return [str(place[0]) for *_, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


@lru_cache(maxsize=1)
def _lookups(_process: int) -> ThreadPoolExecutor:
    """This process's threads: a forked child has none of its parent's."""
    return ThreadPoolExecutor(_LOOKUPS, thread_name_prefix="lookup")


def _left(timeout: float | None, error: type[Exception]) -> float | None:
    """The time that one step may take: its own limit, and never beyond the whole download's.

    Raises:
        Exception: ``error``, when there is none left.
    """
    left = DEADLINE.get() - time.monotonic()
    if left <= 0:
        raise error("the time for the whole download is over")
    if timeout is None:
        return None if left == float("inf") else left
    return min(timeout, left)


class CheckedBackend(httpcore.NetworkBackend):
    """Resolves a name once, looks at every address, and connects to exactly these: no second lookup can differ.

    The name stays what TLS checks the certificate against and what the ``Host`` header says.
    """

    def __init__(self, allowed: Iterable[str], lookup: Resolve = resolve) -> None:
        self._allowed = tuple(ipaddress.ip_network(network) for network in allowed)
        self._lookup = lookup
        self._sockets = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first address that answers.

        Raises:
            AddressRefusedError: the name leads to an address that may not be reached.
            httpcore.ConnectError: it has no address, or none answers.
            httpcore.ConnectTimeout: not in time.
        """
        try:
            found = (
                _lookups(os.getpid()).submit(self._lookup, host, port).result(_left(timeout, httpcore.ConnectTimeout))
            )
        except (OSError, UnicodeError) as error:
            if isinstance(error, TooLate):  # since Python 3.11 a TimeoutError is an OSError
                raise httpcore.ConnectTimeout(f"{host} was not found in time") from error
            raise httpcore.ConnectError(f"{host} is not known: {error}") from error
        failure: Exception = httpcore.ConnectError(f"{host} has no address")
        for address in check(host, found, self._allowed):
            try:
                stream = self._sockets.connect_tcp(
                    address, port, _left(timeout, httpcore.ConnectTimeout), local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
            else:
                return _TimedStream(stream)
        raise failure


class _TimedStream(httpcore.NetworkStream):
    """A connection whose every step ends by ``DEADLINE``: a server that drips a byte a second holds nobody up."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        left = _left(timeout, httpcore.ConnectTimeout)
        return _TimedStream(self._stream.start_tls(ssl_context, server_hostname, left))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
