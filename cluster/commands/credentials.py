"""``darkroom credentials``: a certificate and a key to try signing with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.console import print_json, session

EXAMPLES = {
    "credentials": (
        "darkroom credentials",
        "darkroom credentials --out /etc/darkroom/trial --json",
    ),
}


def credentials(
    context: typer.Context,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="A folder; credentials in the home by default.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Make a certificate, its private key and a trust anchor for trials; nobody outside trusts them."""
    opened = session(context)
    from serving.provenance_certificate import make_trial_pair

    certificate, key, anchor = make_trial_pair(out or opened.home / "credentials")
    settings = {"credentials": {"certificate": str(certificate), "key": str(key)}, "trust_anchors": str(anchor)}
    if json:
        print_json({"provenance": settings})
        return
    for line in (
        "provenance:",
        "  credentials:",
        f"    certificate: {certificate}",
        f"    key: {key}",
        f"  trust_anchors: {anchor}",
    ):
        opened.console.print(line, soft_wrap=True, highlight=False, markup=False)
