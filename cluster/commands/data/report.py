"""``darkroom data report``: one page that shows what a data set holds, what was dropped, and whom that touches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.commands.data.printing import print_json, printable_path, progress_bar
from cluster.console import say

if TYPE_CHECKING:
    from rich.progress import Progress

    from training.data.storage import Folder

EXAMPLES = """Examples:

darkroom data report data/cats   (writes data/cats/report.html)

darkroom data report data/cats --field breed --field tags --out cats.html

darkroom data report s3://bucket/cats --out cats.html --json
"""


def report(
    dataset: Annotated[str, typer.Argument(metavar="DATA", help="A data set that `darkroom data build` made.")],
    out: Annotated[Path | None, typer.Option(help="The page's file; DATA/report.html if not given.")] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(help="Audit this metadata field; may be given again. If not given: fields with 2 to 50 values."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON, too.")] = False,
) -> None:
    """Write one self-contained HTML page on a data set.

    It shows kept and dropped pictures, duplicates side by side, the distributions of sizes and captions, and a bias
    audit: how groups are spread, which words their captions hold, and what share of each the cleaning keeps.
    Dropped pictures are read from the source again, if it is still where it was.
    """
    from dataclasses import asdict

    from training.data.dataset import Dataset
    from training.data.manifest import read_manifest
    from training.data.report.numbers import numbers
    from training.data.report.page import page
    from training.data.report.pictures import pictures
    from training.data.storage import Folder

    folder = Folder.at(dataset)
    place = _place(folder, out)
    manifest = read_manifest(folder)  # first: shards without one can be opened, and have no ledger to report on
    opened = Dataset.open(dataset)
    with progress_bar(quiet=as_json) as progress:
        counted = numbers(folder, manifest, field or (), _told(progress, "Reading the ledger"))
        shown = pictures(opened, folder, counted, _told(progress, "Reading pictures"))
    _write(place, page(counted, shown))
    if as_json:
        print_json({"page": str(place), **asdict(counted)})
    else:
        flagged = [
            f"{audit.field} {group.value or 'all others'}: {group.flag} kept"
            for audit in counted.audits
            for group in audit.groups
            if group.flag
        ]
        typer.echo(f"{counted.inputs:,} inputs: {counted.kept:,} kept, {counted.inputs - counted.kept:,} dropped")
        typer.echo(f"Audited: {', '.join(audit.field for audit in counted.audits) or 'no field'}")
        for line in flagged:
            typer.echo(f"  {line}")
        typer.echo(f"Report: {printable_path(place)}")
    if shown.source:
        say(f"Dropped pictures are not shown: {shown.source}.")


def _place(folder: Folder, out: Path | None) -> Path:
    """Where the page goes.

    Raises:
        UsageError: a data set on remote storage, and no --out.
    """
    from training.data.output import REPORT
    from training.errors import UsageError

    if out is not None:
        return out
    if folder.local is None:
        raise UsageError(
            "The page has no place.",
            value=folder.place,
            rule="a page on this machine for a data set on remote storage",
            mend="give --out FILE.html",
        )
    return folder.local / REPORT


def _told(progress: Progress, what: str) -> Callable[[int, int], None]:
    task = progress.add_task(what, total=None)
    return lambda done, total: progress.update(task, completed=done, total=total)


def _write(place: Path, html: str) -> None:
    """Write the page, whole or not at all.

    Raises:
        DataError: it cannot be written.
    """
    from training.data.storage import Folder
    from training.errors import DataError, StorageError

    try:
        Folder.at(place.absolute().parent).write(place.name, html.encode())
    except (StorageError, OSError) as error:
        rule = error.rule if isinstance(error, StorageError) else error.strerror
        mend = "--out FILE puts it elsewhere"
        raise DataError("The report cannot be written.", value=str(place), rule=rule, mend=mend) from error
