"""Which addresses a webhook may be sent to: public ones, so that nobody reaches through this server inside."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from dataclasses import dataclass
from typing import Any

import httpx

from serving.errors import RequestError
from training.errors import UsageError

_PARAM = "webhook_url"
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(frozen=True)
class Target:
    """Where a webhook goes: the address itself, because a name may point elsewhere when it is asked again.

    Attributes:
        url: with the address instead of the name.
        host: the name with its port, for the header ``Host``.
        name: the name that the server's certificate must have.
    """

    url: httpx.URL
    host: str
    name: str

    @property
    def extensions(self) -> dict[str, Any]:
        """What httpx needs to check the certificate by the name."""
        return {"sni_hostname": self.name}


async def resolve(url: str, *, private: bool) -> Target:
    """Look up where a webhook goes.

    Args:
        url: ``http`` or ``https``, without a user.
        private: whether addresses that are not public are allowed.

    Raises:
        RequestError: it is no such URL, its name is not known, or one of its addresses is not public.
    """
    parsed = _parsed(url)
    port = parsed.port or (443 if parsed.scheme == "https" else 80)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(parsed.host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _refused(url, "a host whose name is known") from error
    addresses = [str(each[4][0]).partition("%")[0] for each in found]
    if not private and not all(map(is_public, addresses)):
        raise _refused(url, "a host whose addresses are all public")
    return Target(parsed.copy_with(host=addresses[0]), parsed.netloc.decode(), parsed.host)


def is_public(address: str) -> bool:
    """Whether an address is on the internet and of one machine; an IPv4 one inside an IPv6 one counts as itself."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if inner is not None:
            found = inner
        elif found in _NAT64:
            found = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
    return found.is_global and not found.is_multicast


def _parsed(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise _refused(url, "an http or https URL") from error
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise _refused(url, "an http or https URL")
    if parsed.userinfo:
        raise _refused("a URL with a user's name", "no name and no password: what is sent is signed")
    return parsed


def _refused(value: str, rule: str) -> RequestError:
    error = UsageError(f"Invalid value for '{_PARAM}'.", value=value[:200], rule=rule)
    return RequestError(error, param=_PARAM)
