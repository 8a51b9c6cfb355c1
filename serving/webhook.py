"""Webhooks: a signed POST when a job has ended, as https://www.standardwebhooks.com has it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import time
from collections.abc import Mapping
from pathlib import Path

import httpx

from serving.errors import RequestError
from serving.webhook_address import Target, resolve
from training.errors import ConfigError

PREFIX = "whsec_"
"""What a secret begins with."""
_TIMEOUT_S = 10.0
_MIN_CHARACTERS = 32

log = logging.getLogger(__name__)


class WebhookSecrets:
    """The secret of each API key, made of the server's one, so that no job carries any.

    Args:
        path: the file of the server's secret.

    Raises:
        ConfigError: it cannot be read, or is too short.
    """

    def __init__(self, path: Path) -> None:
        try:
            text = path.expanduser().read_text().strip()
        except (OSError, UnicodeError) as error:
            raise ConfigError("The webhook secret cannot be read.", value=str(path), rule=str(error)) from error
        if len(text) < _MIN_CHARACTERS:
            rule = f"at least {_MIN_CHARACTERS} characters"
            mend = f"openssl rand -hex 32 > {path}"
            raise ConfigError("The webhook secret is too short.", value=str(path), rule=rule, mend=mend)
        self._master = text.encode()

    def of(self, key: str | None) -> str:
        """The secret of an API key, by its name; None is of those who need none."""
        made = hmac.digest(self._master, b"" if key is None else b"key " + key.encode(), "sha256")
        return PREFIX + base64.b64encode(made).decode()


def signed(secret: str, message_id: str, timestamp_s: int, body: bytes) -> dict[str, str]:
    """The headers of a message: HMAC-SHA256 over ``id.timestamp.body``.

    Args:
        secret: as ``WebhookSecrets.of`` gives it.
        message_id: the same for each try.
        timestamp_s: of this try, seconds since 1970.
        body: as it is sent.
    """
    key = base64.b64decode(secret.removeprefix(PREFIX))
    content = f"{message_id}.{timestamp_s}.".encode() + body
    signature = base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp_s),
        "webhook-signature": f"v1,{signature}",
    }


async def deliver(url: str, message_id: str, body: bytes, secret: str, *, private: bool) -> bool:
    """Try once; whether the receiver answered with a 2xx. Redirects are not followed, what it says is not read.

    Args:
        url: where to.
        message_id: the same for each try.
        body: JSON.
        secret: signs it.
        private: whether addresses that are not public are allowed.
    """
    try:
        target = await resolve(url, private=private)
        status = await _posted(target, body, signed(secret, message_id, int(time.time()), body))
    except (RequestError, httpx.HTTPError, OSError, ValueError) as error:
        log.warning("the webhook of %s failed: %s", message_id, type(error).__name__)
        return False
    if not 200 <= status < 300:
        log.warning("the webhook of %s was answered with %d", message_id, status)
    return 200 <= status < 300


async def _posted(target: Target, body: bytes, headers: Mapping[str, str]) -> int:
    sent = {"host": target.host, "content-type": "application/json", "user-agent": "darkroom", **headers}
    async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False, follow_redirects=False) as client:
        request = client.build_request("POST", target.url, content=body, headers=sent, extensions=target.extensions)
        answer = await client.send(request, stream=True)
        await answer.aclose()
        return answer.status_code
