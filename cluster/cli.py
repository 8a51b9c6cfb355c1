"""``darkroom``: the front door.

A command's module is imported when that command is called, so that ``darkroom --help`` costs next to nothing.
To add a command, write ``cluster/commands/<noun>.py`` and add a line to ``COMMANDS``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from cluster.console import Session, say, show_error, show_unexpected
from training.errors import DarkroomError, UsageError


@dataclass(frozen=True)
class Entry:
    """One line of ``darkroom --help``, and where the command is."""

    module: str
    """Imported on first use."""
    attribute: str
    """A function with typer annotations, or a ``typer.Typer`` with sub-commands."""
    help: str
    """One line."""
    panel: str
    """The heading that it is listed under."""


INTERRUPTED = 130
"""128 + SIGINT, as shells count; what typer makes of Ctrl-C."""

MAKE, SERVE, STACK = "Make a model", "Use a model", "The stack"

COMMANDS = {
    "demo": Entry("cluster.commands.demo", "demo", "From a folder of pictures to an image over HTTP.", MAKE),
    "data": Entry("cluster.commands.data", "app", "Build a data set from pictures, and look at it.", MAKE),
    "train": Entry("cluster.commands.train", "train", "Train a model; the same command again resumes.", MAKE),
    "sweep": Entry("cluster.commands.sweep", "sweep", "Search over the recipe's fields.", MAKE),
    "models": Entry("cluster.commands.models", "app", "List, promote and roll back models.", SERVE),
    "serve": Entry("cluster.commands.serve", "serve", "Put a model behind an HTTP endpoint.", SERVE),
    "generate": Entry("cluster.commands.generate", "generate", "Ask the endpoint for a picture.", SERVE),
    "replay": Entry("cluster.commands.replay", "replay", "Make a picture again from what it says of itself.", SERVE),
    "keys": Entry("cluster.commands.keys", "app", "API keys for the endpoint, with quotas.", SERVE),
    "credentials": Entry("cluster.commands.credentials", "credentials", "A certificate to try signing with.", SERVE),
    "up": Entry("cluster.commands.stack", "up", "Start Ray and MLflow on this machine, or find them again.", STACK),
    "down": Entry("cluster.commands.stack", "down", "Stop them; data and models stay.", STACK),
    "status": Entry("cluster.commands.stack", "status", "What runs, and where.", STACK),
    "doctor": Entry("cluster.commands.stack", "doctor", "What is missing here, and how to mend it.", STACK),
}


class LazyGroup(TyperGroup):
    """A group whose commands are placeholders until one is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Replace the placeholder of the called command by the command itself."""
        entry = COMMANDS.get(args[0])
        if entry is not None:
            self.commands[args[0]] = load(args[0], entry)
        return super().resolve_command(ctx, args)


def load(name: str, entry: Entry) -> Any:
    """Import a command and make it ready to run.

    Examples for ``--help`` come from the module's ``EXAMPLES: dict[str, Sequence[str]]`` under the attribute's name.
    """
    module = importlib.import_module(entry.module)
    target = getattr(module, entry.attribute)
    if isinstance(target, typer.Typer):
        target.info.name = name
        return typer.main.get_command(target)
    examples = [escape(example) for example in getattr(module, "EXAMPLES", {}).get(entry.attribute, ())]
    epilog = "\n\n".join(["[bold]Examples[/bold]", *(f"  {example}" for example in examples)]) if examples else None
    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    single.command(name, epilog=epilog)(target)
    return typer.main.get_command(single)


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="[bold]Examples[/bold]\n\n  darkroom demo\n\n  darkroom up\n\n  darkroom train --help",
)


def _placeholder() -> None:
    """Stands in the list of commands until ``load`` brings the command."""


for _name, _entry in COMMANDS.items():
    app.command(_name, help=_entry.help, rich_help_panel=_entry.panel)(_placeholder)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"darkroom {importlib.metadata.version('darkroom')}")
        raise typer.Exit


@app.callback()
def start(
    context: typer.Context,
    home: Annotated[
        Path, typer.Option(envvar="DARKROOM_HOME", help="Where the local stack, its data and your runs live.")
    ] = Path(".darkroom"),
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Train image generators on a Ray cluster, and put the best one behind an HTTP endpoint."""
    home = home.expanduser()
    session = Session(home.absolute(), debug=debug, console=Console(), home_is_absolute=home.is_absolute())
    if home.exists() and not home.is_dir():
        raise UsageError("The home is not a folder.", value=str(home), rule="a folder, or a place for one")
    if isinstance(context.obj, list):
        context.obj.append(session)  # for main(), which outlives this context
    context.obj = session


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 failed, 2 called wrongly, 130 interrupted."""
    opened: list[Session] = []
    try:
        app(prog_name="darkroom", obj=opened)
    except DarkroomError as error:
        if "--debug" in sys.argv:
            traceback.print_exception(error)
        show_error(error)
        sys.exit(error.exit_code)
    except SystemExit as leaving:
        if leaving.code == INTERRUPTED:
            say("Interrupted.")
        raise
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        show_unexpected(
            error, opened[-1].home if opened else Path(os.environ.get("DARKROOM_HOME", ".darkroom")).absolute()
        )
        sys.exit(1)
    sys.exit(0)
