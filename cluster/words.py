"""A command's own words, to be said again on a cluster: made from what was parsed, never by comparing text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

STAY_HERE = frozenset({"address", "tracking_uri"})
"""Parameters that say where a job goes and with which environment; the job itself has arrived."""


def again(context: typer.Context, **changed: object) -> list[str]:
    """The words that call this command once more, with every path made absolute.

    What was left to its default stays unsaid, so that it is the default of the place where the words are read.

    Args:
        context: of the command.
        changed: parameters that get another value, by their names in the function; None leaves one out.
    """
    options: list[str] = []
    arguments: list[str] = []
    for parameter in context.command.params:
        name = str(parameter.name)
        value = changed[name] if name in changed else _given(context, name)
        if name in STAY_HERE or value is None or value is False:
            continue
        if parameter.param_type_name == "argument":
            arguments.append(_word(value))
        elif value is True:
            options.append(max(parameter.opts, key=len))
        else:
            each = value if isinstance(value, list | tuple) else [value]
            options += [f"{max(parameter.opts, key=len)}={_word(one)}" for one in each]
    return [*_names(context), *options, *(["--", *arguments] if arguments else [])]


def _given(context: typer.Context, name: str) -> Any:
    """A parameter's parsed value; None when it is only the default."""
    source = context.get_parameter_source(name)
    return None if source is None or source.name.startswith("DEFAULT") else context.params[name]


def _names(context: Any) -> list[str]:
    """The command's name, after those of its groups; typer does not export the type of a context's parent."""
    parent = context.parent
    return [] if parent is None else [*_names(parent), str(context.info_name)]


def _word(value: object) -> str:
    # a relative path would mean a place below Ray's working directory there
    return str(value.absolute()) if isinstance(value, Path) else str(value)
