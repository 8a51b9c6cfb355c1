"""What must not be kept of a URL: whoever has a signed one may do what its owner may."""

from __future__ import annotations

import re

_HIDDEN = "***"
_NAMES = (
    r"x-(?:amz|goog|oss|ms)-[\w-]+|key-pair-id|"
    r"(?:[\w.-]{0,40}[_-])?(?:signature|sig|hmac|hdnts|hdnea|policy|credentials?|token|jwt|auth|session|sessionid|"
    r"key|secret|password|passwd|pwd|(?:api|access|auth|secret)(?:key|token)|(?:aws|oss|google)?access(?:key)?id)"
)
"""Parameters that sign a URL or say who asks: of S3, Google, Azure, CDNs and common web services."""

_URL = re.compile(r"://(?:[^\s\"<>\\]|\\[^\"])+")
_PARAMETER = re.compile(rf"((?<![\w.-])(?:{_NAMES})=)(?:[^&#\s\"'<>\\]|\\[^\"])+", re.IGNORECASE)
_WHO = re.compile(r"(?<=://)[^/?#@\s\"<>\\]+(?=@)")


def without_secrets(text: str) -> str:
    """A text, or the JSON of fields, whose URLs have ``***`` for names, passwords and what signs them."""
    return _URL.sub(lambda url: hidden(url[0]), text) if "://" in text else text


def hidden(text: str) -> str:
    """The same for a text that may quote parameters without their URL."""
    return _WHO.sub(_HIDDEN, _PARAMETER.sub(rf"\1{_HIDDEN}", text))
