"""A thin client of our own endpoint, for the command line and the demo; any OpenAI client does as well."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import httpx
from pydantic import ValidationError

from serving.errors import ServeError
from training.errors import DarkroomError, UsageError


@dataclass(frozen=True)
class Picture:
    """One image as it came over HTTP.

    Attributes:
        seed: the seed that makes it again.
        file: the bytes of the image file.
    """

    seed: int
    file: bytes


def request_images(url: str, body: dict[str, object], *, timeout_s: float = 300) -> list[Picture]:
    """Ask for images.

    Args:
        url: the API's base, e.g. ``http://127.0.0.1:8000``.
        body: as ``POST /v1/images/generations`` takes it; None values are left out.
        timeout_s: how long to wait for the whole answer.

    Raises:
        UsageError: the endpoint refuses the request; its own words.
        ServeError: nobody answers there, it is no such endpoint, or it failed.
    """
    sent = {key: value for key, value in body.items() if value is not None}
    place = f"{url.rstrip('/')}/v1/images/generations"
    try:
        answer = httpx.post(place, json=sent, timeout=httpx.Timeout(timeout_s, connect=5))
    except httpx.ReadTimeout as error:
        rule = f"an answer within {timeout_s:.0f} s"
        raise ServeError("The endpoint is too slow.", value=url, rule=rule, mend="--timeout, or fewer steps") from error
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise ServeError(
            "No endpoint answers there.",
            value=url,
            rule=str(error) or type(error).__name__,
            mend="darkroom serve NAME@champion, or give --url of one that runs",
        ) from error
    if answer.status_code != 200:
        raise _refusal(url, answer)
    return [Picture(item["seed"], base64.b64decode(item["b64_json"])) for item in answer.json()["data"]]


def _refusal(url: str, answer: httpx.Response) -> DarkroomError:
    """The endpoint's own words, where it speaks our envelope."""
    from serving.envelope import ErrorEnvelope

    try:
        error = ErrorEnvelope.model_validate_json(answer.content).error
    except ValidationError:
        return ServeError(
            "What answers there is not an image endpoint, or it is not up.",
            value=f"{url}: {answer.status_code} {answer.text[:100]!r}",
            rule="OpenAI's error envelope",
            mend="darkroom serve NAME@champion",
        )
    if 400 <= answer.status_code < 500 and answer.status_code != 429:
        return UsageError(error.message)
    return ServeError(error.message)
