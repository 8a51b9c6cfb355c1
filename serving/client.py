"""A thin client of our own endpoint, for the command line and the demo; any OpenAI client does as well."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import Base64Bytes, BaseModel, ValidationError

from serving.errors import ServeError
from serving.rollout import LOOPBACK
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


class _Item(BaseModel):
    """What we read of one image."""

    seed: int
    b64_json: Base64Bytes


class _Answer(BaseModel):
    """What we read of an answer."""

    data: list[_Item]


def request_images(
    url: str, body: dict[str, object], *, files: Mapping[str, bytes] | None = None, timeout_s: float = 300
) -> list[Picture]:
    """Ask for images.

    Args:
        url: the API's base, e.g. ``http://127.0.0.1:8000``.
        body: as ``POST /v1/images/generations`` takes it; None values are left out.
        files: encoded pictures, ``image`` and maybe ``mask``: with any, ``POST /v1/images/edits`` is asked.
        timeout_s: how long to wait for the whole answer.

    Raises:
        UsageError: the endpoint refuses the request; its own words.
        ServeError: nobody answers there, it is no such endpoint, or it failed.
    """
    sent = {key: value for key, value in body.items() if value is not None}
    place = f"{url.rstrip('/')}/v1/images/{'edits' if files else 'generations'}"
    content = _form(sent, files) if files else _json(sent)
    try:
        timeout = httpx.Timeout(timeout_s, connect=5)
        answer = httpx.post(
            place,
            **content,
            timeout=timeout,
            trust_env=httpx.URL(place).host not in LOOPBACK,
        )
    except httpx.ReadTimeout as error:
        rule = f"an answer within {timeout_s:.0f} s"
        raise ServeError("The endpoint is too slow.", value=url, rule=rule, mend="--timeout, or fewer steps") from error
    except (httpx.RequestError, httpx.InvalidURL) as error:
        raise ServeError(
            "No endpoint answers there.",
            value=url,
            rule=str(error) or type(error).__name__,
            mend="darkroom serve NAME@champion, or give --url of one that runs",
        ) from error
    if answer.status_code != 200:
        raise _refusal(url, answer)
    try:
        items = _Answer.model_validate_json(answer.content).data
    except ValidationError as error:
        raise _stranger(url, answer, "images with their seeds, as Darkroom sends them") from error
    return [Picture(item.seed, item.b64_json) for item in items]


def _json(body: dict[str, object]) -> dict[str, Any]:
    """In ASCII: whether a text is fit for a prompt is for the endpoint to say."""
    return {"content": json.dumps(body), "headers": {"content-type": "application/json"}}


def _form(body: dict[str, object], files: Mapping[str, bytes]) -> dict[str, Any]:
    """A form's text is UTF-8, which holds no half of a character.

    Raises:
        UsageError: a text that has one.
    """
    try:
        fields = {name: str(value).encode() for name, value in body.items()}
    except UnicodeEncodeError as error:
        rule = "whole Unicode characters"
        raise UsageError("A text cannot be sent.", value=ascii(error.object)[:80], rule=rule) from error
    return {"data": fields, "files": dict(files)}


def _refusal(url: str, answer: httpx.Response) -> DarkroomError:
    """The endpoint's own words, where it speaks our envelope."""
    from serving.envelope import ErrorEnvelope

    try:
        error = ErrorEnvelope.model_validate_json(answer.content).error
    except ValidationError:
        return _stranger(url, answer, "OpenAI's error envelope")
    if 400 <= answer.status_code < 500 and answer.status_code != 429:
        return UsageError(error.message)
    return ServeError(error.message)


def _stranger(url: str, answer: httpx.Response, rule: str) -> ServeError:
    return ServeError(
        "What answers there is not an image endpoint, or it is not up.",
        value=f"{url}: {answer.status_code} {answer.text[:100]!r}",
        rule=rule,
        mend="darkroom serve NAME@champion",
    )
