"""The recipe of a training run: the sections composed, read from YAML and overridden in one place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from training.checkpoint import CheckpointConfig
from training.conditioning_config import ConditioningConfig, TextConfig
from training.cost_config import CostConfig
from training.data.loader_config import LoaderConfig
from training.ema import EmaConfig
from training.engine_config import EngineConfig
from training.engine_rules import require_workable
from training.errors import ConfigError
from training.evaluate.config import EvaluationConfig
from training.finetune.inversion_config import TrainedAdapter
from training.finetune.sections import filled_in
from training.finetune.start_config import StartConfig
from training.fit import require_fitting
from training.guards_config import GuardsConfig, check_undo
from training.latents_config import LatentsConfig
from training.models import ModelConfig, UNetConfig
from training.models.mup import check_optimizer
from training.objectives import ObjectiveConfig, RectifiedFlow
from training.optim import AdamWConfig, OptimizerConfig, ScheduleConfig, WarmupStableDecay
from training.recipe_files import RECIPES, recipe_names
from training.tracking import TrackingConfig
from training.workers_config import WorkersConfig

EXACT = (
    *("seed", "global_batch", "model", "conditioning", "latents", "objective", "optimizer", "schedule"),
    *("ema.decay", "ema.post_hoc"),
    *("start", "adapter"),
    *(f"data.{key}" for key in ("block", "window", "buckets", "augment", "scaled_decoding")),
)
"""Sections and fields that a run cannot change on its way."""
_TAGS = ("kind", "family")
"""What chooses among the members of a union; a member's fields are not those of another."""


class TrainConfig(BaseModel):
    """One experiment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")
    """Names the run's folder, its MLflow run and the registered model."""
    seed: int = Field(default=0, ge=0)
    """Seeds the weights and keys every draw."""
    steps: int = Field(default=1000, ge=1)
    """Optimizer steps."""
    global_batch: int = Field(default=64, ge=1)
    """Samples per optimizer step, over all workers and accumulation."""
    data: LoaderConfig
    """Where the samples come from."""
    model: ModelConfig = UNetConfig()
    """The network."""
    latents: LatentsConfig | None = None
    """The autoencoder whose latents the network sees; without one it sees pixels."""
    start: StartConfig | None = None
    """The pipeline that the run starts from; it decides the four sections around this one."""
    adapter: TrainedAdapter | None = None
    """What is trained beside the pipeline's network; without it the network itself."""
    conditioning: ConditioningConfig = TextConfig()
    """What the network is told about each picture."""
    objective: ObjectiveConfig = RectifiedFlow()
    """What the network learns to predict."""
    optimizer: OptimizerConfig = AdamWConfig()
    """How the weights move."""
    schedule: ScheduleConfig = WarmupStableDecay()
    """How the learning rate changes."""
    ema: EmaConfig = EmaConfig()
    """The averaged weights, which are the ones published."""
    engine: EngineConfig = EngineConfig()
    """DeepSpeed's engine."""
    workers: WorkersConfig = WorkersConfig()
    """Ray Train's worker group."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run's state is kept."""
    guards: GuardsConfig = GuardsConfig()
    """When a step or a rank cannot be trusted."""
    cost: CostConfig = CostConfig()
    """What the hardware costs, and where its electricity comes from."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured and shown while training."""
    tracking: TrackingConfig = TrackingConfig()
    """Where MLflow files the run."""

    @model_validator(mode="before")
    @classmethod
    def _pipeline_decides(cls, values: Any) -> Any:
        return filled_in(values) if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _rows_for_all(self) -> TrainConfig:
        if self.global_batch < self.workers.largest:
            raise ValueError(
                f"global_batch {self.global_batch} must be at least {self.workers.largest}, a row for each worker"
            )
        return self

    @model_validator(mode="after")
    def _steps_can_be_undone(self) -> TrainConfig:
        check_undo(self.guards, self.checkpoint.memory_every_steps)
        return self

    @model_validator(mode="after")
    def _engine_works(self) -> TrainConfig:
        require_workable(self.engine, self.optimizer, self.schedule, self.ema)
        return self

    @model_validator(mode="after")
    def _network_fits(self) -> TrainConfig:
        # how latents lie is said by a directory that may be on another machine: their sides are looked at there
        require_fitting(self.model, self.conditioning.kind, self.data.buckets, factor=0 if self.latents else 1)
        return self

    @model_validator(mode="after")
    def _rate_transfers(self) -> TrainConfig:
        check_optimizer(self.model, self.optimizer.kind)
        return self


def load_recipe(reference: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe and apply overrides.

    Args:
        reference: a packaged recipe's name or a YAML file. ``base: other`` inside it starts from another recipe.
        overrides: ``section.key=value`` pairs; values are YAML.

    Raises:
        ConfigError: no such recipe, not YAML, an unknown key or a value outside its rule.
    """
    values = _read(reference, seen=())
    for assignment in overrides:
        assign(values, assignment)
    return parse(values, source=reference)


def parse(values: Mapping[str, Any], source: str = "recipe") -> TrainConfig:
    """Validate a mapping.

    Raises:
        ConfigError: the first thing that is wrong, with its path, value, rule and options.
    """
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise _explain(error, source) from None


def _read(reference: str, seen: tuple[str, ...]) -> dict[str, Any]:
    path = Path(reference) if reference.endswith((".yaml", ".yml")) else RECIPES / f"{reference}.yaml"
    if not path.is_file():
        raise ConfigError(
            "There is no such recipe.",
            value=reference,
            rule="a packaged recipe's name or the path of a .yaml file",
            options=recipe_names(),
        )
    if str(path) in seen:
        raise ConfigError("The recipe is its own base.", value=reference, rule="bases form a chain that ends")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"The recipe is not YAML: {error}", value=str(path)) from None
    if not isinstance(values, dict):
        raise ConfigError("The recipe is not a mapping.", value=str(path), rule="`key: value` lines at the top level")
    base = values.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise ConfigError("A base is a recipe's name.", value=base, rule="base: NAME", options=recipe_names())
    return values if base is None else _merge(_read(base, (*seen, str(path))), values)


def _merge(base: dict[str, Any], delta: Mapping[str, Any]) -> dict[str, Any]:
    merged = {} if any(tag in delta and base.get(tag, delta[tag]) != delta[tag] for tag in _TAGS) else dict(base)
    for key, value in delta.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def assign(values: dict[str, Any], assignment: str) -> None:
    """Set the field that a ``section.key=value`` word names in plain values; the value is YAML.

    Raises:
        ConfigError: no key, no value, or not YAML.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise ConfigError("An override has no value.", value=assignment, rule="section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"An override's value is not YAML: {error}", value=assignment) from None
    if isinstance(value, str):
        # YAML 1.1 reads 1e-3 as text; nobody who writes it means text
        with contextlib.suppress(ValueError):
            value = float(value)
    override(values, path.strip(), value)


def override(values: dict[str, Any], path: str, value: Any) -> None:
    """Set the field at a dotted path in a recipe's plain values."""
    *sections, key = path.split(".")
    target = values
    for section in sections:
        inner = target.get(section)
        target[section] = dict(inner) if isinstance(inner, dict) else {}
        target = target[section]
    if key in _TAGS and target.get(key, value) != value:
        target.clear()  # another member of the union: the fields of the former are not its own
    target[key] = value


def _explain(error: ValidationError, source: str) -> ConfigError:
    first = error.errors()[0]
    section, keys = _walk([str(part) for part in first["loc"]])
    key = ".".join(keys) or "the recipe"
    if first["type"] == "extra_forbidden":
        return ConfigError(
            f"{source}: unknown key {key}.",
            value=first["input"],
            rule="only the keys that the section defines",
            options=sorted(section.model_fields) if section else (),
        )
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    value = None if isinstance(first["input"], dict) and first["type"] != "missing" else first["input"]
    rule = first["msg"].removeprefix("Value error, ")
    return ConfigError(f"{source}: {key} is not valid{more}.", value=None if value == {} else value, rule=rule)


def _walk(path: Sequence[str]) -> tuple[type[BaseModel] | None, list[str]]:
    """The section that the last key of a path belongs to, and the path without the tags of unions."""
    model: type[BaseModel] | None = TrainConfig
    section: type[BaseModel] | None = model
    keys: list[str] = []
    for place, part in enumerate(path):
        field = model.model_fields.get(part) if model else None
        if field is None and model is not None and _has_tag(model, part):
            continue  # a union's tag, which pydantic names and a reader does not write
        section, keys = model, [*keys, part]
        following = path[place + 1] if place + 1 < len(path) else None
        model = _model_of(field.annotation, following) if field else None
    return section, keys


def _model_of(annotation: Any, tag: str | None) -> type[BaseModel] | None:
    """The model class of a field; of a union, the member with the tag."""
    models = list(_models(annotation))
    tagged = [model for model in models if _has_tag(model, tag)]
    return next(iter(tagged or models), None)


def _has_tag(model: type[BaseModel], tag: str | None) -> bool:
    fields = [model.model_fields[name] for name in _TAGS if name in model.model_fields]
    return any(tag in get_args(field.annotation) for field in fields)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The model classes of an annotation, whatever they are wrapped into."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)
