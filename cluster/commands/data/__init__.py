"""``darkroom data``: build a data set from pictures, and look at one. One file per command."""

from __future__ import annotations

import typer

from cluster.commands.data import audit, build, encode, forget, report, show

app = typer.Typer(
    help="Build a data set from pictures, and look at one.",
    no_args_is_help=True,
    epilog="Examples:\n\ndarkroom data build pictures/ data/cats\n\ndarkroom data report data/cats",
)
app.command(epilog=build.EXAMPLES)(build.build)
app.command(epilog=show.EXAMPLES)(show.show)
app.command(epilog=forget.EXAMPLES)(forget.forget)
app.command(epilog=report.EXAMPLES)(report.report)
app.command(epilog=encode.EXAMPLES)(encode.encode)
app.command(epilog=audit.EXAMPLES)(audit.audit)
