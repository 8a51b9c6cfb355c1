"""From the options of ``darkroom data encode`` to what is to be encoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from training.conditioning_config import ClassConfig, NothingConfig, TextConfig
from training.errors import ConfigError, UsageError
from training.latents_config import LatentsConfig

if TYPE_CHECKING:
    from training.config import TrainConfig
    from training.data.encode import Job

Section = TypeVar("Section", bound=BaseModel)


@dataclass(frozen=True)
class Asked:
    """The options; None was not given.

    Attributes:
        text: a transformers directory.
        max_tokens: of a caption.
        autoencoder: a diffusers directory.
        resolution: side of square pictures, in pixels.
        flip: the latents of mirrored pictures too.
        dtype: how values are kept.
    """

    text: str | None = None
    max_tokens: int | None = None
    autoencoder: str | None = None
    resolution: int | None = None
    flip: bool = False
    dtype: str | None = None


def jobs_of(asked: Asked, recipe: TrainConfig | None) -> list[Job]:
    """What to encode: what a run of the recipe needs, if there is one, changed by the options.

    Raises:
        UsageError: nothing was asked for, or latents of no size.
        ConfigError: an option is out of its range, or latents cannot be kept under the recipe's augmentation.
    """
    jobs: list[Job] = []
    if asked.text or recipe:
        jobs.extend(_told(asked, recipe))
    autoencoder = asked.autoencoder or (recipe.latents.autoencoder if recipe and recipe.latents else None)
    if autoencoder:
        jobs.append(_latents(asked, autoencoder, recipe))
    if not jobs:
        raise UsageError(
            "There is nothing to encode.",
            rule="at least one encoder",
            options=["--recipe RECIPE", "--text ENCODER", "--autoencoder DIR"],
        )
    return jobs


def _told(asked: Asked, recipe: TrainConfig | None) -> list[Job]:
    """What a network is told: captions through an encoder, or classes."""
    from training.data.encoded.classes import ClassJob
    from training.data.encoded.text import TextJob

    section = recipe.conditioning if recipe else TextConfig()
    if asked.text and not isinstance(section, TextConfig):
        section = TextConfig()
    if isinstance(section, NothingConfig):
        return []
    if isinstance(section, ClassConfig):
        return [ClassJob(section)]
    told = {"encoder": asked.text, "max_tokens": asked.max_tokens, "dtype": asked.dtype}
    return [TextJob(_changed(section, told))]


def _latents(asked: Asked, autoencoder: str, recipe: TrainConfig | None) -> Job:
    from training.data.encoded.latent_reader import require_cacheable
    from training.data.encoded.latents import LatentsJob

    resolution = asked.resolution or (recipe.model.resolution if recipe else None)
    if resolution is None:
        raise UsageError(
            "Latents of pictures of which size?", rule="a resolution", options=["--resolution 512", "--recipe RECIPE"]
        )
    own = recipe.latents if recipe and recipe.latents else LatentsConfig(autoencoder=autoencoder)
    config = _changed(own, {"autoencoder": autoencoder, "dtype": asked.dtype})
    if recipe is None:
        return LatentsJob(config, resolution, flips=asked.flip)
    require_cacheable(recipe.data.augment)
    return LatentsJob(
        config,
        resolution,
        buckets=recipe.data.buckets,
        fewest=recipe.global_batch,
        flips=asked.flip or recipe.data.augment.flip > 0,
        scaled=recipe.data.scaled_decoding,
    )


def _changed(section: Section, told: Mapping[str, Any]) -> Section:
    given = {name: value for name, value in told.items() if value is not None}
    try:
        return type(section).model_validate({**section.model_dump(), **given})
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][-1])
        option = {"encoder": "--text"}.get(field, f"--{field.replace('_', '-')}")
        raise ConfigError(f"{option} is not valid.", value=first["input"], rule=first["msg"]) from error
