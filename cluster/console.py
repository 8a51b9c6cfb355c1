"""What the command line shows: results on stdout, everything else on stderr, an error on one screen."""

from __future__ import annotations

import json
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from training.errors import DarkroomError
from training.recipe_files import recipe_names

RECIPE_HELP = f"A packaged recipe ({', '.join(recipe_names())}) or a YAML file."
"""For the help of a command that takes a recipe."""

_LABELS = ("  value:", "  rule:", "  options:", "  mend:")


@dataclass(frozen=True)
class Session:
    """The global options of one call of ``darkroom``."""

    home: Path
    """Where the local stack, its data and the runs live; absolute."""
    debug: bool
    """Show tracebacks."""
    console: Console
    """Results, on stdout."""
    home_is_absolute: bool
    """Whether the caller named the home by an absolute path, which means the same place on another machine."""


def session(context: typer.Context) -> Session:
    """The session that ``darkroom``'s callback made."""
    found = context.find_object(Session)
    if found is None:
        raise TypeError("session() was called outside of a darkroom command")
    return found


def stderr() -> Console:
    """Where progress and errors go, so that stdout can be read by a script."""
    return Console(stderr=True, highlight=False)


def say(message: str) -> None:
    """One line of progress."""
    stderr().print(Text(message), soft_wrap=True)


def print_json(data: object) -> None:
    """``data`` as indented JSON on stdout, without colours or wrapping."""
    typer.echo(json.dumps(data, indent=2, default=str))


def show_error(error: DarkroomError) -> None:
    """Value, rule, options and mend, one labelled line each; never parsed as markup, never cut."""
    first, *rest = error.as_text().split("\n")
    screen = stderr()
    screen.print(Text.assemble(("error: ", "bold red"), first), soft_wrap=True)
    for line in rest:
        label = next((label for label in _LABELS if line.startswith(label)), "")
        screen.print(Text.assemble((label, "bold"), line.removeprefix(label)), soft_wrap=True)


def show_unexpected(error: BaseException, home: Path) -> None:
    """A fault of ours or of a library: what it was, and the file that holds the traceback."""
    path = _keep_traceback("".join(traceback.format_exception(error)), home)
    lines = (str(error).strip() or type(error).__name__).splitlines()
    screen = stderr()
    screen.print(
        Text.assemble(("unexpected error: ", "bold red"), f"{type(error).__name__}: {lines[0]}"), soft_wrap=True
    )
    screen.print(Text.assemble(("  traceback:", "bold"), f" {path}"), soft_wrap=True)
    screen.print(
        Text.assemble(("  mend:", "bold"), " run again with --debug before the command to see it here"), soft_wrap=True
    )


def _keep_traceback(text: str, home: Path) -> Path:
    """The file that holds ``text``: among ``home``'s logs, or in the system's temporary folder when that fails."""
    path = home / "logs" / f"error-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError:  # an unusable home may be the very fault that is shown
        with tempfile.NamedTemporaryFile("w", prefix="darkroom-error-", suffix=".txt", delete=False) as file:
            file.write(text)
        return Path(file.name)
    return path
