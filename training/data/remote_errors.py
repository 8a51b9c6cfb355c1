"""What a remote storage answered, in words that a reader can use and that hold no secret."""

from __future__ import annotations

import os

from training.data.redaction import hidden

MENDS = {
    "s3": "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, the region, and AWS_ENDPOINT_URL for a "
    "server other than Amazon's; FSSPEC_S3_ANON=true reads public buckets without credentials",
    "gs": "check GOOGLE_APPLICATION_CREDENTIALS, and STORAGE_EMULATOR_HOST for a server other than Google's",
    "hf": "check HF_TOKEN, HF_ENDPOINT for a mirror, and that HF_HUB_OFFLINE is not set",
}
"""What to look at, by protocol."""

_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_REFUSALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "ParamValidationError",
    "ProfileNotFound",
    "InvalidConfigError",
    "DefaultCredentialsError",
    "OfflineModeIsEnabled",
}
"""Errors of botocore, google.auth and huggingface_hub after which asking again is no use; by name: none is imported."""

_BUSY = {408, 409, 425, 429}
"""Statuses below 500 that another moment may change."""


def is_refusal(error: BaseException) -> bool:
    """Whether the server has answered no, or the request cannot be sent: asking again would not help."""
    if isinstance(error, PermissionError | FileExistsError | ValueError | TypeError | ImportError):
        return True
    if isinstance(error, OSError) and str(error).startswith("Forbidden"):  # gcsfs keeps no status
        return True
    status = _status(error) or _status(error.__cause__)
    refused = status is not None and 400 <= status < 500 and status not in _BUSY
    return refused or type(error).__name__ in _REFUSALS


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that the server answered with, where each library keeps it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:  # huggingface_hub, or gcsfs
        status = getattr(response, "status_code", None) or getattr(error, "code", None)
    return status if isinstance(status, int) else None


def plain_words(error: BaseException) -> str:
    """The error in one line without secrets."""
    text = " ".join(str(error).split()) or type(error).__name__
    if text == "Forbidden":  # S3 gives no reason where it answers without a body
        text = "forbidden (HTTP 403): a wrong key, or one without the right to do this"
    for name in _SECRETS:
        secret = os.environ.get(name)
        if secret:
            text = text.replace(secret, "***")
    text = hidden(text)
    return text if len(text) <= 300 else f"{text[:300]}..."
