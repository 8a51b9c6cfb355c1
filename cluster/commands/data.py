"""``darkroom data``: build a data set from pictures, and look at one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.console import session

if TYPE_CHECKING:
    from rich.progress import Progress

    from training.data.config import BuildConfig
    from training.data.dataset import Dataset
    from training.data.manifest import Manifest

app = typer.Typer(help="Build a data set from pictures, and look at one.", no_args_is_help=True)

_BUILD_EXAMPLES = """Examples:

darkroom data build pictures/ data/cats   (captions from cat.txt or cat.json beside cat.jpg, or captions.jsonl)

darkroom data build pictures.tar data/cats --held-out 0.05

darkroom data build captions.csv data/cats --min-side 256 --background '#808080' --force
"""

_SHEET = "contact_sheet.png"
_SHEET_PICTURES = 64


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
    force: Annotated[bool, typer.Option("--force", help="Replace a data set built from something else.")] = False,
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
        from cluster import jobs, pipeline

        raise typer.Exit(jobs.run_remotely(address, pipeline.words_for_job(source, out), session(context)))
    from training.data.build import build as build_dataset

    config = _config(
        {"held_out": held_out, "shard_mb": shard_mb, "background": background},
        {"min_side_px": min_side, "max_pixels": max_pixels, "max_bytes": max_bytes},
    )
    before = _stamp(out)
    with _progress(quiet=as_json) as progress:
        task = progress.add_task("Judging pictures", total=None)
        manifest = build_dataset(
            source, out, config, lambda done, total: progress.update(task, completed=done, total=total), force=force
        )
    _report_build(out, manifest, unchanged=before is not None and before == _stamp(out), as_json=as_json)


@app.command(epilog="Example: darkroom data show data/cats --verify")
def show(
    dataset: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that `darkroom data build` made.")],
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file with its checksum.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Print what a data set holds, and write a contact sheet of it to OUT/contact_sheet.png."""
    from training.data.dataset import Dataset
    from training.data.manifest import check_files

    opened = Dataset.open(dataset)
    if verify:
        check_files(dataset, opened.manifest, checksums=True)
    sheet = _write_sheet(opened)
    if as_json:
        _print_json({"path": str(dataset), "contact_sheet": str(sheet), "manifest": opened.manifest.model_dump()})
        return
    _print_table(dataset, opened.manifest)
    typer.echo(f"Contact sheet: {sheet}")


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

    path = out / MANIFEST
    return path.stat().st_ino if path.is_file() else None


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
    if unchanged:
        typer.echo(f"{out} is already the finished result of this source and these options; nothing was done.")
    _print_table(out, manifest)
    if manifest.dropped:
        typer.echo(f"Dropped inputs are named in {out / LEDGER}")
    typer.echo(f"Look at it: darkroom data show {out}")


def _print_json(value: object) -> None:
    import json

    typer.echo(json.dumps(value, indent=2))


def _print_table(path: Path, manifest: Manifest) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Data set {path}", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("hash", manifest.hash)
    table.add_row("inputs", f"{manifest.inputs} ({manifest.kept} kept, {manifest.inputs - manifest.kept} dropped)")
    for rule, count in manifest.dropped.items():
        table.add_row(f"  dropped: {rule}", str(count))
    for name, split in manifest.splits.items():
        size = f"{split.count} pictures, {split.image_bytes / 1e6:.1f} MB, {len(split.shards)} shard(s)"
        table.add_row(name, size)
    for licence, count in manifest.licences.items():
        table.add_row(f"licence: {licence}", str(count))
    table.add_row("background", manifest.config.background)
    table.add_row("files", f"{len(manifest.files)}, {sum(f.size_bytes for f in manifest.files.values()) / 1e6:.1f} MB")
    Console().print(table)


def _write_sheet(dataset: Dataset) -> Path:
    """A contact sheet of pictures spread evenly over the training split.

    Raises:
        DataError: a picture cannot be read, or the sheet cannot be written.
    """
    import numpy as np

    from training.errors import DataError
    from training.evaluate.contact_sheet import contact_sheet

    split = dataset.split("train")
    chosen = np.linspace(0, len(split) - 1, min(_SHEET_PICTURES, len(split))).astype(int).tolist()
    pictures = [split.picture(index) for index in chosen]
    sheet = contact_sheet([image for image, _ in pictures], [str(fields["caption"]) for _, fields in pictures])
    path = dataset.path / _SHEET
    try:
        sheet.save(path)
    except OSError as error:
        raise DataError("The contact sheet cannot be written.", value=str(path), rule=error.strerror) from error
    return path
