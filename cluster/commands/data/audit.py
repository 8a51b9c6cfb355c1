"""``darkroom data audit``: whether a run has consumed what it should have."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.commands.data.printing import print_json, progress_bar
from cluster.console import session

if TYPE_CHECKING:
    from training.data.audit_report import AuditReport, EpochUse, UndoneSteps

EXAMPLES = """Examples:

darkroom data audit cats

darkroom data audit cats --verify --json

darkroom data audit /shared/darkroom/runs/cats --data /mnt/copy/cats
"""

_SHOWN = 20
"""Epochs, skipped samples and findings that are printed; --json has them all."""


def audit(
    context: typer.Context,
    run: Annotated[str, typer.Argument(help="A run's name, or its folder.")],
    data: Annotated[str | None, typer.Option(help="The data set, if it is no longer where the recipe says.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every picture and compare its sha256, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Recompute from the data set and the recipe what every step of a run must have consumed, and compare.

    The run's ledger of use has a digest per step. This says how many samples were lost, duplicated or skipped, and in
    which steps. The exit code is 1 where something is wrong.
    """
    from training.data.audit import audit as compare

    with progress_bar(quiet=as_json) as progress:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what.capitalize(), total=total)
            progress.update(tasks[what], completed=done, total=total)

        report = compare(_run_dir(context, run), data, verify=verify, progress=show)
    if as_json:
        print_json(asdict(report))
    else:
        _print(report)
    if report.findings:
        raise typer.Exit(1)


def _run_dir(context: typer.Context, run: str) -> Path:
    """A run's folder by its name in the home; a path is a folder itself."""
    named = session(context).home / "runs" / run
    return named if "/" not in run and named.is_dir() else Path(run)


def _verdict(epoch: EpochUse, samples: int) -> str:
    """Whether every sample was used once in an epoch, or could not be read."""
    if epoch.due < samples:
        return "not over"
    if epoch.used + epoch.skipped < epoch.due:
        return "no"
    return {True: "yes", False: "no", None: "not counted"}[epoch.exact]


def _rows(report: AuditReport) -> list[tuple[str, ...]]:
    """The epochs in order; those in a row that went alike share a line, for there may be thousands."""
    rows: list[tuple[str, ...]] = []
    for facts, alike in itertools.groupby(sorted(report.epochs.items()), key=lambda each: _facts(report, each[1])):
        numbers = [number for number, _ in alike]
        shown = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
        rows.append((shown, *facts))
    return rows


def _facts(report: AuditReport, epoch: EpochUse) -> tuple[str, str, str, str]:
    return str(epoch.due), str(epoch.used), str(epoch.skipped), _verdict(epoch, report.samples)


def _steps(undone: UndoneSteps) -> str:
    return f"step {undone.last}" if undone.first == undone.last else f"steps {undone.first} to {undone.last}"


def _print(report: AuditReport) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from training.data.entries import printable

    typer.echo(f"Run {printable(report.run)}")
    typer.echo(
        f"data set {printable(report.dataset)}, {report.split}: {report.samples} samples, hash {report.data_hash}"
    )
    typer.echo(
        f"steps {report.steps}, samples consumed {report.consumed}, lost {report.lost}, "
        f"duplicated {report.duplicated}, skipped {len(report.skipped)}, steps done again {report.redone}, "
        f"steps undone {report.undone_steps}"
    )
    for undone in report.undone[:_SHOWN]:
        typer.echo(printable(f"undone: {_steps(undone)}, not in the weights: {undone.reason or 'no reason is noted'}"))
    if len(report.undone) > _SHOWN:
        typer.echo(f"and {len(report.undone) - _SHOWN} times more; --json has them all")
    for sample in list(report.skipped.values())[:_SHOWN]:
        epochs = ", ".join(map(str, sample.epochs[:_SHOWN]))
        typer.echo(printable(f"skipped: {sample.name} ({sample.source}) in epochs {epochs}: {sample.reason}"))
    table = Table("epochs", "due in each", "consumed", "skipped", "every sample once")
    for row in _rows(report)[-_SHOWN:]:
        table.add_row(*row)
    Console().print(table)
    for finding in report.findings[:_SHOWN]:
        Console().print(Text(printable(finding.message), style="red"), soft_wrap=True)
    if len(report.findings) > _SHOWN:
        typer.echo(f"and {len(report.findings) - _SHOWN} findings more; --json has them all")
    typer.echo(f"digest {report.digest}: " + ("something is wrong." if report.findings else "all is accounted for."))
