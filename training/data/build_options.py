"""A build's config from a file, ready values and ``section.key=value`` words, each over the one before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from training.config import assign, override
from training.data.config import BuildConfig
from training.errors import ConfigError


def build_config(file: Path | None, values: Mapping[str, Any], assignments: Sequence[str]) -> BuildConfig:
    """The checked config.

    Args:
        file: YAML with any part of the config; None for the defaults.
        values: by dotted path.
        assignments: ``section.key=value`` words; values are YAML.

    Raises:
        ConfigError: no such file, not YAML, an unknown key or a value outside its rule.
    """
    found = {} if file is None else _read(file)
    for path, value in values.items():
        override(found, path, value)
    for assignment in assignments:
        assign(found, assignment)
    try:
        return BuildConfig.model_validate(found)
    except ValidationError as error:
        raise _explained(error) from None


def _read(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError("The config cannot be read.", value=str(file), rule=error.strerror) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"The config is not YAML: {error}", value=str(file)) from None
    if not isinstance(values, dict):
        raise ConfigError("The config is not a mapping.", value=str(file), rule="`key: value` lines at the top level")
    return values


def _explained(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    keys = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        message, rule = f"There is no option {'.'.join(keys)}.", "a key of its section"
        return ConfigError(message, value=first["input"], rule=rule, options=sorted(_section(keys[:-1]).model_fields))
    rule = first["msg"].removeprefix("Value error, ")
    return ConfigError(f"{'.'.join(keys)} is not valid.", value=first["input"], rule=rule)


def _section(keys: Sequence[str]) -> type[BaseModel]:
    """The section at a path of keys, as far as there are sections."""
    model: type[BaseModel] = BuildConfig
    for key in keys:
        kind = model.model_fields[key].annotation if key in model.model_fields else None
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            model = kind
    return model
