"""``darkroom data build``: pictures become a data set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.commands.data.executors import PLACE, AddressOption, Where, WhereOption, executor_of
from cluster.commands.data.printing import BuildProgress, print_json, print_table, printable_path
from cluster.console import say, session

if TYPE_CHECKING:
    from training.data.manifest import Manifest

EXAMPLES = """Examples:

darkroom data build pictures/ data/cats   (captions from cat.txt or cat.json beside cat.jpg, or captions.jsonl)

darkroom data build pictures.tar data/cats --held-out 0.05

darkroom data build captions.csv data/cats --min-side 256 --background '#808080' --force

darkroom data build urls.parquet s3://bucket/cats --set clean.unsafe.enabled=true --set store.kind=jpeg

darkroom data build pictures/ data/cats --executor ray   (on the local stack; with --address, on any Ray cluster)
"""

CLEANING = "Cleaning"
SHARDS = "Shards"


def build(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="A folder, a tar, a manifest or a list of URLs; a path or s3://...")],
    out: Annotated[str, typer.Argument(help="The data set's folder, a path or s3://...; it appears when complete.")],
    config: Annotated[Path | None, typer.Option(help="YAML with any of the options, by section.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any option of the build, as in --config; repeatable."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a data set that is damaged or another one.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
    min_side: Annotated[
        int | None, typer.Option(rich_help_panel=CLEANING, help="Drop pictures whose shorter side has fewer pixels.")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(rich_help_panel=CLEANING, help="Drop pictures with more pixels, before decoding.")
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(rich_help_panel=CLEANING, help="Drop pictures with more encoded bytes, unread.")
    ] = None,
    held_out: Annotated[
        float | None, typer.Option(rich_help_panel=SHARDS, help="Share of the pictures kept away from training.")
    ] = None,
    shard_mb: Annotated[int | None, typer.Option(rich_help_panel=SHARDS, help="Megabytes of a shard.")] = None,
    background: Annotated[
        str | None, typer.Option(rich_help_panel=SHARDS, help="Colour behind transparent pixels: a name or #rrggbb.")
    ] = None,
    executor: WhereOption = Where.AUTO,
    workers: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=PLACE, help="Processes or Ray actors; one per core if not set.")
    ] = None,
    address: AddressOption = None,
) -> None:
    """Turn pictures and captions into WebDataset shards, an index, a manifest and a ledger.

    Broken, oversize and tiny pictures are dropped and named in the ledger. The same command again finds the finished
    result, or goes on with what was done: it lies in OUT.building until all is.
    """
    from training.data.build_options import build_config

    flags = {
        "clean.size.min_side_px": min_side,
        "clean.size.max_pixels": max_pixels,
        "clean.size.max_bytes": max_bytes,
        "held_out": held_out,
        "shard_mb": shard_mb,
        "background": background,
    }
    asked = build_config(config, {path: value for path, value in flags.items() if value is not None}, assignments or ())
    if address:
        from cluster import jobs, words

        said = words.again(context, source=_absolute(source), out=_absolute(out))
        raise typer.Exit(jobs.run_remotely(address, said, session(context)))
    from training.data.build import build as build_dataset

    before = _stamp(out)
    with (
        _saying_how_to_go_on(out),
        executor_of(executor, workers, context) as chosen,
        BuildProgress(quiet=as_json) as progress,
    ):
        manifest = build_dataset(source, out, asked, progress.on_step, force=force, executor=chosen)
    _report_build(out, manifest, unchanged=before is not None and before == _stamp(out), as_json=as_json)


def _absolute(place: str) -> str:
    from training.data.storage import Folder, is_remote

    return place if is_remote(place) or "::" in place else Folder.at(place).place


@contextmanager
def _saying_how_to_go_on(out: str) -> Iterator[None]:
    from training.data.storage import Folder
    from training.data.workspace import work_folder

    try:
        yield
    except KeyboardInterrupt:
        place = work_folder(Folder.at(out)).place
        say(f"What was done lies in {printable_path(place)}; the same command goes on from there.")
        raise


def _stamp(out: str) -> str | None:
    """Changes when the data set is replaced."""
    from training.data.manifest import MANIFEST
    from training.data.storage import Folder
    from training.errors import StorageError

    try:
        return Folder.at(out).stat(MANIFEST).stamp
    except (FileNotFoundError, StorageError):  # none there yet; or not to be read, which the build will say
        return None


def _report_build(out: str, manifest: Manifest, *, unchanged: bool, as_json: bool) -> None:
    if as_json:
        print_json({"path": out, "unchanged": unchanged, "manifest": manifest.model_dump(mode="json")})
        return
    place = printable_path(out)
    if unchanged:
        typer.echo(f"{place} is already the finished result of this source and these options; nothing was done.")
    print_table(out, manifest)
    if manifest.dropped:
        typer.echo(f"Dropped inputs are named in {place}/{manifest.ledger}; look at them: darkroom data report {place}")
    typer.echo(f"Look at it: darkroom data show {place}")
