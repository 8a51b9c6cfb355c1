"""What the ``darkroom data`` commands print alike: tables, JSON, progress and paths."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import typer

from cluster.console import say, stderr

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from training.data.manifest import Manifest
    from training.data.progress import Step


def progress_bar(*, quiet: bool) -> Progress:
    """A progress bar on stderr; none where ``quiet``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True)


_TITLES = {
    "compare": "Comparing with the result that is there",
    "judge": "Judging pictures",
    "decide": "Comparing pictures with each other",
    "write": "Writing shards",
}

_PLAIN_EVERY_S = 15.0
"""Without a terminal, how often a line of progress is printed."""


class BuildProgress:
    """Follows a build: a bar for each stage, or a line now and then where there is no terminal.

    Args:
        quiet: show nothing.
    """

    def __init__(self, *, quiet: bool) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = stderr()
        self._quiet = quiet
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._printed_s = 0.0

    def __enter__(self) -> BuildProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def on_step(self, step: Step) -> None:
        """Show one step."""
        begins = step.stage not in self._tasks
        if begins:
            self._tasks[step.stage] = self._bar.add_task(_TITLES[step.stage], total=step.total, told="")
        told = _told(step)
        self._bar.update(self._tasks[step.stage], completed=step.done, total=step.total or None, told=told)
        now = time.monotonic()
        if not self._quiet and not self._console.is_terminal and (begins or now - self._printed_s > _PLAIN_EVERY_S):
            self._printed_s = now
            say(f"{_TITLES[step.stage]}: {told}" if told else _TITLES[step.stage])


def _told(step: Step) -> str:
    if not step.done:
        return ""
    counts = [f"{step.done:,}" + (f" of {step.total:,}" if step.total else "")]
    counts += [f"{step.found:,} of them by an earlier try"] if step.found else []
    counts += [f"{step.dropped:,} dropped"] if step.dropped else []
    return ", ".join(counts)


def print_json(value: object) -> None:
    """Print a value for a script."""
    import json

    typer.echo(json.dumps(value, indent=2))


def printable_path(path: Path | str) -> str:
    """A path or place as every terminal can take it."""
    from training.data.entries import printable

    return printable(str(path))


def print_table(path: Path | str, manifest: Manifest) -> None:
    """What a data set holds, for people."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from training.data.entries import printable

    # as Text: a stranger's licence is neither rich's markup nor the terminal's
    table = Table(title=Text(f"Data set {printable_path(path)}"), show_header=False, title_justify="left")
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
