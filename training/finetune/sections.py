"""From a recipe that starts from a pipeline to the sections that the pipeline decides; read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from training.errors import ConfigError
from training.finetune.layout import Pipeline, default_tokens, factor_of
from training.finetune.objective import objective_of

_PRETRAINED = "pretrained"


def filled_in(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's plain values, with the sections that the pipeline decides which ``start`` names.

    They are ``model``, ``latents``, ``conditioning`` and ``objective``. What the recipe says itself stands, apart from
    another network. A recipe that was filled in stays as it is: the pipeline is not looked at again.

    Raises:
        ConfigError: the pipeline is not there, not whole or of no known layout; or the recipe describes a network.
    """
    start, model = values.get("start"), dict(_section(values, "model"))
    if start is None:
        _refuse_alone(values)
        return dict(values)
    reference = start.get("pipeline") if isinstance(start, Mapping) else getattr(start, "pipeline", None)
    if not isinstance(reference, str) or not reference or (model.get("family") == _PRETRAINED and "pipeline" in model):
        return dict(values)  # the field's own rule tells what is wrong
    pipeline = _found(reference)
    _refuse_network(model)
    factor = factor_of(pipeline.config("vae"))
    resolution = model.get("resolution") or _side(pipeline) * factor
    filled = {"family": _PRETRAINED, "pipeline": str(pipeline.directory), "resolution": resolution}
    return {
        **values,
        "model": filled,
        "latents": {"autoencoder": str(pipeline.directory / "vae"), **_section(values, "latents")},
        "conditioning": _conditioning(values, pipeline),
        "objective": _objective(values, pipeline, resolution, factor),
    }


def _found(reference: str) -> Pipeline:
    from training.finetune.hub import pipeline_directory

    return Pipeline.read(pipeline_directory(reference))


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    if found is None:
        return {}
    if isinstance(found, BaseModel):  # a config that was built in Python
        return found.model_dump()
    return found if isinstance(found, Mapping) else {}  # the field's own rule tells what is wrong


def _refuse_alone(values: Mapping[str, Any]) -> None:
    """Refuse what makes sense beside a pipeline only; a bundle of it would hold the parts of another model."""
    if values.get("adapter") is not None:
        raise ConfigError(
            "An adapter is trained beside a pipeline's weights.",
            value="adapter",
            rule="a start section beside the adapter section",
            mend="--set start.pipeline=DIR",
        )
    for section, tag, own in (("model", "family", _PRETRAINED), ("conditioning", "kind", "pipeline")):
        if _section(values, section).get(tag) == own:
            raise ConfigError(
                f"{section}.{tag}={own} is what a pipeline decides.",
                value=own,
                rule=f"a start section beside it, or another {section}.{tag}",
                mend="--set start.pipeline=DIR",
            )


def _refuse_network(model: Mapping[str, Any]) -> None:
    """A section ``model`` that says more than the pictures' size means another network than the pipeline's."""
    strange = sorted(set(model) - {"resolution", "family", "pipeline"})
    if strange or model.get("family", _PRETRAINED) != _PRETRAINED:
        raise ConfigError(
            "A recipe that starts from a pipeline describes no network.",
            value=f"model.{strange[0]}" if strange else f"model.family: {model['family']}",
            rule="model.resolution alone, for the network is the pipeline's",
            mend="start from the recipe finetune: its base has no network",
        )


def _side(pipeline: Pipeline) -> int:
    """Of the latents that the network was trained on, as diffusers' pipeline takes it."""
    told = pipeline.network.get("sample_size") or 128  # FLUX does not say
    return int(told[0] if isinstance(told, list) else told)


def _conditioning(values: Mapping[str, Any], pipeline: Pipeline) -> dict[str, Any]:
    said = _section(values, "conditioning")
    if said.get("kind", "pipeline") != "pipeline":
        raise ConfigError(
            "A pipeline's network is told captions by the pipeline's own encoders.",
            value=f"conditioning.kind: {said['kind']}",
            rule="conditioning.kind: pipeline, or no such section",
        )
    own = {"kind": "pipeline", "pipeline": str(pipeline.directory), "max_tokens": default_tokens(pipeline)}
    return {**own, **said, "inverted": _inverted(values, pipeline)}


def _inverted(values: Mapping[str, Any], pipeline: Pipeline) -> dict[str, Any] | None:
    """The word that the recipe's adapter learns."""
    adapter = _section(values, "adapter")
    if adapter.get("kind") != "textual_inversion":
        return None
    if pipeline.kind not in ("sd", "sdxl"):
        raise ConfigError(
            "A word can be learnt where CLIP alone reads it.",
            value=pipeline.name,
            rule="adapter.kind textual_inversion is for the layouts of Stable Diffusion 1.x, 2.x and XL",
            options=["adapter.kind: lora", "adapter.kind: dora"],
        )
    # what is wrong with its values, the adapter's own rules tell
    return {name: adapter[name] for name in ("token", "vectors", "template") if name in adapter}


def _objective(values: Mapping[str, Any], pipeline: Pipeline, resolution: Any, factor: int) -> dict[str, Any]:
    said = _section(values, "objective")
    scheduler = pipeline.config("scheduler")
    patch = 2 if pipeline.kind == "flux" else int(pipeline.network.get("patch_size") or 1)
    side = int(resolution) // factor // patch if isinstance(resolution, int) else 64
    try:
        own = objective_of(scheduler, side * side)
    except ConfigError:
        if "kind" not in said:
            raise
        return dict(said)  # as the message's mend says
    return {**own, **said} if said.get("kind", own["kind"]) == own["kind"] else dict(said)
