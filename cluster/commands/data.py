"""``darkroom data``: build a data set from pictures, and look at one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.console import say, session

if TYPE_CHECKING:
    from rich.progress import Progress

    from training.data.config import BuildConfig
    from training.data.dataset import Dataset
    from training.data.manifest import Manifest
    from training.errors import DataError

app = typer.Typer(
    help="Build a data set from pictures, and look at one.",
    no_args_is_help=True,
    epilog="Examples:\n\ndarkroom data build pictures/ data/cats\n\ndarkroom data show data/cats",
)

_BUILD_EXAMPLES = """Examples:

darkroom data build pictures/ data/cats   (captions from cat.txt or cat.json beside cat.jpg, or captions.jsonl)

darkroom data build pictures.tar data/cats --held-out 0.05

darkroom data build captions.csv data/cats --min-side 256 --background '#808080' --force
"""

_SHEET_PICTURES = 64
_CELL_PX = 96
_NAMED = 5
"""Unreadable pictures that a warning names."""


@app.command(epilog=_BUILD_EXAMPLES)
def build(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(help="A folder, a tar, or a JSONL or CSV manifest of pictures.")],
    out: Annotated[Path, typer.Argument(help="The data set's folder; it appears when it is complete.")],
    held_out: Annotated[float, typer.Option(help="Share of the pictures kept away from training.")] = 0.1,
    min_side: Annotated[int, typer.Option(help="Drop pictures whose shorter side has fewer pixels.")] = 16,
    max_pixels: Annotated[int, typer.Option(help="Drop pictures with more pixels, before decoding.")] = 64_000_000,
    max_bytes: Annotated[int, typer.Option(help="Drop pictures with more encoded bytes, unread.")] = 64_000_000,
    shard_mb: Annotated[int, typer.Option(help="Megabytes of a shard.")] = 64,
    background: Annotated[str, typer.Option(help="Colour behind transparent pixels: a name or #rrggbb.")] = "white",
    force: Annotated[bool, typer.Option("--force", help="Replace a data set that is damaged or another one.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
    address: Annotated[
        str | None, typer.Option(help="A Ray dashboard, http://host:port: run there, on paths that the cluster sees.")
    ] = None,
) -> None:
    """Turn pictures and captions into WebDataset shards, an index, a manifest and a ledger.

    Broken, oversize and tiny pictures are dropped and named in OUT/ledger.jsonl. The same command again finds the
    finished result.
    """
    if address:
        from cluster import jobs, words

        raise typer.Exit(jobs.run_remotely(address, words.again(context), session(context)))
    from training.data.build import build as build_dataset

    config = _config(
        {"held_out": held_out, "shard_mb": shard_mb, "background": background},
        {"min_side_px": min_side, "max_pixels": max_pixels, "max_bytes": max_bytes},
    )
    before = _stamp(out)
    with _progress(quiet=as_json) as progress:
        task = progress.add_task("Reading pictures", total=None)
        manifest = build_dataset(
            source, out, config, lambda done, total: progress.update(task, completed=done, total=total), force=force
        )
    _report_build(out, manifest, unchanged=before is not None and before == _stamp(out), as_json=as_json)


@app.command(epilog="Example: darkroom data show data/cats --verify")
def show(
    dataset: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that `darkroom data build` made.")],
    sheet: Annotated[Path | None, typer.Option(help="The contact sheet's file, a PNG; in OUT if not given.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file with its checksum.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Print what a data set holds, and write a contact sheet of it to OUT/contact_sheet.png."""
    from training.data.dataset import Dataset
    from training.data.manifest import check_files
    from training.data.output import CONTACT_SHEET
    from training.errors import DataError

    opened = Dataset.open(dataset)
    if verify:
        check_files(dataset, opened.manifest, checksums=True)
    if not as_json:
        _print_table(dataset, opened.manifest)
    made = _write_sheet(opened, sheet or dataset / CONTACT_SHEET)
    if as_json:
        place = None if made.path is None else str(made.path)
        found = {"path": str(dataset), "contact_sheet": place, "unreadable": made.unreadable}
        _print_json({**found, "manifest": opened.manifest.model_dump()})
    elif made.path is not None:
        typer.echo(f"Contact sheet: {_printable(made.path)}")
    if made.unreadable:
        raise DataError(
            f"{len(made.unreadable)} pictures of the data set cannot be read.",
            value="; ".join(made.unreadable[:_NAMED]),
            mend="--verify names the damaged files; `darkroom data build` makes them again with --force",
        )
    if made.failure is None:
        return
    if sheet is None and not os.access(dataset, os.W_OK):  # a data set that is only read is nothing wrong
        say(f"No contact sheet: {_printable(dataset)} cannot be written; --sheet PATH puts it elsewhere.")
        return
    raise made.failure


def _config(options: dict[str, object], rules: dict[str, object]) -> BuildConfig:
    """The checked options.

    Raises:
        ConfigError: the first one that is out of range.
    """
    from pydantic import ValidationError

    from training.data.config import BuildConfig
    from training.errors import ConfigError

    names = {"min_side_px": "min_side"}
    try:
        return BuildConfig.model_validate({**options, "clean": rules})
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][-1])
        option = "--" + names.get(field, field).replace("_", "-")
        raise ConfigError(f"{option} is not valid.", value=first["input"], rule=first["msg"]) from error


def _stamp(out: Path) -> int | None:
    """Changes when the data set is replaced."""
    from training.data.manifest import MANIFEST

    try:
        return (out / MANIFEST).stat().st_ino
    except OSError:  # none there yet; or not to be read, which the build will say
        return None


def _progress(*, quiet: bool) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True)


def _report_build(out: Path, manifest: Manifest, *, unchanged: bool, as_json: bool) -> None:
    from training.data.ledger import LEDGER

    if as_json:
        _print_json({"path": str(out), "unchanged": unchanged, "manifest": manifest.model_dump()})
        return
    place = _printable(out)
    if unchanged:
        typer.echo(f"{place} is already the finished result of this source and these options; nothing was done.")
    _print_table(out, manifest)
    if manifest.dropped:
        typer.echo(f"Dropped inputs are named in {_printable(out / LEDGER)}")
    typer.echo(f"Look at it: darkroom data show {place}")


def _print_json(value: object) -> None:
    import json

    typer.echo(json.dumps(value, indent=2))


def _printable(path: Path) -> str:
    from training.data.entries import printable

    return printable(str(path))


def _print_table(path: Path, manifest: Manifest) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from training.data.entries import printable

    # as Text: a stranger's licence is neither rich's markup nor the terminal's
    table = Table(title=Text(f"Data set {_printable(path)}"), show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in _facts(manifest):
        table.add_row(Text(printable(name)), Text(printable(value)))
    Console().print(table)


def _facts(manifest: Manifest) -> Iterator[tuple[str, str]]:
    yield "hash", manifest.hash
    yield "inputs", f"{manifest.inputs} ({manifest.kept} kept, {manifest.inputs - manifest.kept} dropped)"
    for rule, count in manifest.dropped.items():
        yield f"  dropped: {rule}", str(count)
    for split_name, split in manifest.splits.items():
        yield split_name, f"{split.count} pictures, {split.image_bytes / 1e6:.1f} MB, {len(split.shards)} shard(s)"
    yield "without a caption", f"{manifest.without_caption} of {manifest.kept}"
    for licence, count in manifest.licences.items():
        yield f"licence: {licence}", str(count)
    yield "background", manifest.config.background
    yield "files", f"{len(manifest.files)}, {sum(f.size_bytes for f in manifest.files.values()) / 1e6:.1f} MB"


@dataclass(frozen=True)
class _Sheet:
    """A contact sheet's file, if there is one; what could not be read for it; why it could not be written."""

    path: Path | None
    unreadable: list[str]
    failure: DataError | None = None


def _write_sheet(dataset: Dataset, path: Path) -> _Sheet:
    """A contact sheet of pictures spread evenly over the training split; failures are returned: they are told last."""
    import numpy as np
    from PIL import Image

    from training.errors import DataError, StorageError
    from training.evaluate.contact_sheet import contact_sheet

    split = dataset.split("train")
    pictures: list[Image.Image] = []
    captions: list[str] = []
    unreadable: list[str] = []
    for index in np.linspace(0, len(split) - 1, min(_SHEET_PICTURES, len(split))).astype(int).tolist():
        try:
            picture, fields = split.picture(index)
        except (DataError, StorageError) as error:
            unreadable.append(f"train[{index}]: {error.rule}")
            continue
        picture.thumbnail((_CELL_PX, _CELL_PX), Image.Resampling.LANCZOS)  # 64 of full size would fill the memory
        pictures.append(picture)
        captions.append(str(fields["caption"]))
    if not pictures:
        return _Sheet(None, unreadable)
    try:
        contact_sheet(pictures, captions, cell_px=_CELL_PX).save(path, "PNG")
    except OSError as error:
        message, mend = "The contact sheet cannot be written.", "--sheet PATH puts it elsewhere"
        return _Sheet(None, unreadable, DataError(message, value=str(path), rule=error.strerror, mend=mend))
    return _Sheet(path, unreadable)
