"""The OpenAPI document: what FastAPI finds, and what it cannot know of this server.

Errors of every status have their dialect's one shape, and none is FastAPI's own; a stream is a second kind of answer;
null means the default; and the limits are the deployment's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from serving.config import LimitConfig
from serving.model import ModelCard

_JSON = "application/json"
_STREAM = "text/event-stream"
_STREAMED = ("/v1/images/generations", "/v1/images/edits", "/v1/images/variations")
_ASKED = ("ImagesRequest", "JobRequest", "TextToImage", "ImageToImage")
"""Bodies in which null is the default."""


def describe(
    app: FastAPI, card: ModelCard, limits: LimitConfig, shapes: Mapping[str, type[BaseModel]], usual: type[BaseModel]
) -> None:
    """Make ``app`` tell all of this.

    Args:
        app: whose routes are all there.
        card: the model.
        limits: what one request may ask for.
        shapes: of errors below a path, where they are not as usual.
        usual: the shape of all other errors.
    """

    def told() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = FastAPI.openapi(app)
            schemas = document["components"]["schemas"]
            for shape in (usual, *shapes.values()):
                schema = shape.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas |= {**schema.pop("$defs", {}), shape.__name__: schema}
            for path, operation in _operations(document):
                shape = next((shape for prefix, shape in shapes.items() if path.startswith(prefix)), usual)
                _answers(path, operation["responses"], shape.__name__)
            for body in (schemas[name] for name in _ASKED):
                _limit(body, card, limits)
                _allow_null(body)
            for form in _forms(document):
                _limit(form, card, limits)
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
        return app.openapi_schema or {}

    app.openapi = told  # type: ignore[method-assign]


def _operations(document: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for operation in item.values():
            yield path, operation


def _answers(path: str, responses: dict[str, Any], error: str) -> None:
    """An operation's responses: no status of FastAPI's own, one shape for all that is not told otherwise."""
    responses.pop("422", None)
    schema = {"$ref": f"#/components/schemas/{error}"}
    responses.setdefault("default", {"description": "An error", "content": {_JSON: {"schema": schema}}})
    if path in _STREAMED:
        responses["200"]["content"][_STREAM] = {}
    for response in responses.values():
        if _STREAM in response.get("content", {}):  # a schema would be that of each event, and they are of many kinds
            response["content"][_STREAM] = {}


def _forms(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Schemas of the forms that ask for pictures."""
    for _, operation in _operations(document):
        form = operation.get("requestBody", {}).get("content", {}).get("multipart/form-data", {}).get("schema", {})
        if "prompt" in form.get("properties", {}):
            yield form


def _limit(body: dict[str, Any], card: ModelCard, limits: LimitConfig) -> None:
    """Put the deployment's limits into a body's schema."""
    bounds: dict[str, dict[str, Any]] = {
        "n": {"maximum": limits.max_images_per_request},
        "batch_size": {"maximum": limits.max_images_per_request},
        "n_iter": {"maximum": limits.max_images_per_request},
        "num_inference_steps": {"maximum": limits.max_steps},
        "steps": {"maximum": limits.max_steps},
        "guidance_scale": {"maximum": limits.max_guidance_scale},
        "cfg_scale": {"maximum": limits.max_guidance_scale},
        "prompt": {"maxLength": limits.max_prompt_characters},
        "negative_prompt": {"maxLength": limits.max_prompt_characters},
        "model": {"enum": list(card.names)},
    }
    for name, bound in bounds.items():
        schema = body["properties"].get(name, {})
        for choice in schema.get("anyOf", [schema]):
            if choice.get("type") != "null":
                choice.update(bound)


def _allow_null(body: dict[str, Any]) -> None:
    """What need not be there may be null."""
    for name, schema in body["properties"].items():
        if name not in body.get("required", ()) and "anyOf" not in schema:
            about = {key: schema.pop(key) for key in ("title", "description", "default") if key in schema}
            body["properties"][name] = {"anyOf": [schema, {"type": "null"}], **about}
