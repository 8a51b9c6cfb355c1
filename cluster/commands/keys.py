"""``darkroom keys``: who may ask the endpoint, and for how much."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.console import print_json, session
from training.errors import UsageError

if TYPE_CHECKING:
    from serving.keys import KeyFile

app = typer.Typer(
    help="API keys for the endpoint. Without a file of keys it is open to everybody who reaches it.",
    no_args_is_help=True,
    add_completion=False,
    epilog="Examples:\n\ndarkroom keys add studio --images-per-minute 60\n\ndarkroom keys list\n\n"
    "darkroom keys remove studio\n\ndarkroom serve emoji@champion --set admission.keys=$PWD/.darkroom/keys.json",
)

File = Annotated[
    Path | None, typer.Option("--file", help="The file of keys; keys.json in the home by default.", show_default=False)
]
Name = Annotated[str, typer.Argument(help="Whose key it is.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


@app.command(epilog="Example: darkroom keys add studio --images-per-minute 60 --images-per-day 5000")
def add(
    context: typer.Context,
    name: Name,
    images_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Images; not counted by default.", show_default=False)
    ] = None,
    images_per_day: Annotated[
        int | None, typer.Option(min=1, help="Images; not counted by default.", show_default=False)
    ] = None,
    megapixel_steps_per_day: Annotated[
        float | None,
        typer.Option(min=1e-6, help="Work: rows x steps x pixels / 1e6; not counted by default.", show_default=False),
    ] = None,
    priority_ceiling: Annotated[int, typer.Option(min=0, max=9, help="The most urgent that it may be; 0 is most.")] = 5,
    file: File = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print its secret, this once; the file holds a checksum alone."""
    from serving.keys import KeyFile, Quota, new_key, write_keys

    path = _place(context, file)
    known = _read(path) if path.exists() else KeyFile()
    if name in {key.name for key in known.keys}:
        options = [f"darkroom keys remove {name}", "another name"]
        raise UsageError("There is such a key already.", value=name, rule="one key for each name", options=options)
    quota = Quota(
        images_per_minute=images_per_minute,
        images_per_day=images_per_day,
        megapixel_steps_per_day=megapixel_steps_per_day,
    )
    key, secret = new_key(name, quota, priority_ceiling)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_keys(path, KeyFile(keys=(*known.keys, key)))
    if as_json:
        print_json({"name": name, "secret": secret, "file": str(path)})
    else:
        typer.echo(secret)


@app.command("list", epilog="Example: darkroom keys list --json")
def list_keys(context: typer.Context, file: File = None, as_json: AsJson = False) -> None:
    """The keys, without their secrets, which are nowhere."""
    found = _read(_place(context, file)).keys
    if as_json:
        print_json([key.model_dump(exclude={"sha256"}) for key in found])
        return
    for key in found:
        counted = key.quota.model_dump(exclude_none=True)
        quota = ", ".join(f"{name.replace('_', ' ')} {limit:g}" for name, limit in counted.items())
        typer.echo(f"{key.name}  made {key.created_utc}  priority {key.priority_ceiling}..9  {quota or 'no quota'}")


@app.command(epilog="Example: darkroom keys remove studio")
def remove(context: typer.Context, name: Name, file: File = None) -> None:
    """Take a key out: replicas that run refuse it a second later."""
    from serving.keys import KeyFile, write_keys

    path = _place(context, file)
    known = _read(path)
    left = tuple(key for key in known.keys if key.name != name)
    if len(left) == len(known.keys):
        raise UsageError("There is no such key.", value=name, options=[key.name for key in known.keys])
    write_keys(path, KeyFile(keys=left))
    typer.echo(f"{name} is refused from now on.")


def _place(context: typer.Context, file: Path | None) -> Path:
    return session(context).home / "keys.json" if file is None else file


def _read(path: Path) -> KeyFile:
    from serving.keys import read_keys

    return read_keys(path)
