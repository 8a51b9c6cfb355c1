"""``darkroom up``, ``down``, ``status`` and ``doctor``."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer
from rich.table import Column, Table
from rich.text import Text

from cluster import stack
from cluster.console import Session, print_json, say, session
from cluster.stack import ComponentStatus, Stack
from training.errors import StackError
from training.self_tests.finding import Finding as Tested

EXAMPLES = {
    "up": ("darkroom up", "darkroom up --mlflow-port 5000 --json", "darkroom --home /data/darkroom up"),
    "down": ("darkroom down",),
    "status": ("darkroom status", "darkroom status --json | jq .components"),
    "doctor": ("darkroom doctor", "darkroom doctor --deep", "darkroom doctor --deep --address http://head:8265"),
}

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def up(
    context: typer.Context,
    mlflow_port: Annotated[int | None, typer.Option(help="MLflow's port; a free one by default.")] = None,
    serve_port: Annotated[int | None, typer.Option(help="The API's port; a free one by default.")] = None,
    dashboard_port: Annotated[int | None, typer.Option(help="Ray's dashboard; a free one by default.")] = None,
    json: Json = False,
) -> None:
    """Start Ray and MLflow as background processes, or find them again, and print where they are."""
    opened = session(context)
    ports = {"mlflow": mlflow_port, "serve": serve_port, "dashboard": dashboard_port}
    found = stack.ensure(opened.home, say, ports={name: port for name, port in ports.items() if port is not None})
    _show(opened, found, json)


def down(context: typer.Context) -> None:
    """Stop this home's Ray, MLflow and Serve, and nothing else. Data, runs and models stay."""
    home = session(context).home
    count = stack.stop(home, say)
    say(f"stopped {count} processes" if count else f"nothing ran in {home}")


def status(context: typer.Context, json: Json = False) -> None:
    """Show each component's address, process, uptime and state, Ray's resources and Serve's applications."""
    opened = session(context)
    found = stack.find(opened.home)
    if found is None and not json:
        say(f"no complete stack runs in {opened.home}; `darkroom up` starts it")
    _show(opened, found, json)


def doctor(
    context: typer.Context,
    deep: Annotated[
        bool, typer.Option("--deep", help="Train a little on the cluster's nodes too, and measure whether it is right.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --deep, processes that train together; by default one per node.")
    ] = None,
    json: Json = False,
    address: Annotated[str | None, typer.Option(help="A Ray dashboard, http://host:port: run there as a job.")] = None,
) -> None:
    """Look for what is missing here, and say how to mend it. Exits with 1 when something is.

    With --deep it starts the stack if need be, and runs the self-tests of the real engine on it.
    """
    from cluster import jobs, self_tests, words
    from cluster.doctor import examine

    opened = session(context)
    if address:
        raise typer.Exit(jobs.run_remotely(address, words.again(context), opened))
    findings = examine(opened.home)
    if not json:
        for finding in findings:
            _finding(opened, finding.ok, f"{finding.name}: {finding.detail}", finding.mend)
    tested: list[Tested] = []
    if deep:
        tested = self_tests.run(opened.home, workers, lambda finding: None if json else _tested(opened, finding))
    if json:
        print_json([*map(dataclasses.asdict, findings), *map(self_tests.as_json, tested)])
    if not (all(finding.ok for finding in findings) and all(finding.ok for finding in tested)):
        raise typer.Exit(1)


def _tested(opened: Session, finding: Tested) -> None:
    from cluster.self_tests import figure

    text = f"self-test {finding.name}: {finding.detail} ({figure(finding)})"
    _finding(opened, finding.ok, text, finding.mend)


def _finding(opened: Session, ok: bool, text: str, mend: str | None) -> None:
    label = ("ok      ", "green") if ok else ("problem ", "bold red")
    opened.console.print(Text.assemble(label, text), soft_wrap=True)
    if not ok and mend:
        opened.console.print(Text(f"          mend: {mend}"), soft_wrap=True)


def _show(opened: Session, found: Stack | None, json: bool) -> None:
    parts = stack.status(opened.home)
    live = _live(found) if found else {"resources": {}, "applications": {}}
    if json:
        addresses = dataclasses.asdict(found) if found else None
        print_json({"stack": addresses, "components": [dataclasses.asdict(part) for part in parts], **live})
        return
    if parts:
        opened.console.print(_table(parts, live["applications"], found))
    for name, amount in live["resources"].items():
        if name in ("CPU", "GPU"):
            opened.console.print(f"{name}: {amount['used']:g} of {amount['total']:g} in use", highlight=False)


def _live(found: Stack) -> dict[str, Any]:
    """What the dashboard says; nothing while it does not answer, which the table shows."""
    try:
        serve = found.dashboard.serve()["applications"]
        resources = found.dashboard.resources()
    except StackError as error:
        say(error.message)
        return {"resources": {}, "applications": {}}
    return {"resources": resources, "applications": {name: app["status"] for name, app in serve.items()}}


def _table(parts: list[ComponentStatus], applications: dict[str, str], found: Stack | None) -> Table:
    table = Table("component", "state", Column("address", overflow="fold"), "pid", "up", box=None, pad_edge=False)
    for part in parts:
        uptime = "" if part.uptime_s is None else _duration(part.uptime_s)
        style = "green" if part.state == "running" else "red"
        table.add_row(part.name, Text(part.state, style), part.address, str(part.pid or ""), uptime)
    if found:
        for name, state in applications.items() or [("serve", "nothing deployed")]:
            table.add_row(name, state.lower(), f"http://127.0.0.1:{found.serve_port}")
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
