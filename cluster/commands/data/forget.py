"""``darkroom data forget``: take samples out of a data set, for good."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cluster.commands.data.printing import print_json, printable_path

if TYPE_CHECKING:
    from training.data.forget import Forgotten
    from training.data.forgotten import OptOut

EXAMPLES = """Examples:

darkroom data forget data/cats --creator "Jane Doe" --dry-run

darkroom data forget s3://bucket/cats --domain example.com --domain example.org

darkroom data forget data/cats --hash 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
"""


def forget(
    dataset: Annotated[str, typer.Argument(metavar="OUT", help="What `darkroom data build` made, a path or s3://...")],
    hashes: Annotated[
        list[str] | None, typer.Option("--hash", help="A picture by the sha256 of its file, as the ledger has it.")
    ] = None,
    creators: Annotated[
        list[str] | None, typer.Option("--creator", help="All pictures of a creator, whatever the case of the name.")
    ] = None,
    domains: Annotated[
        list[str] | None, typer.Option("--domain", help="All pictures of a domain and of its subdomains.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be taken out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Take pictures out of a data set; the shards that hold them are written anew, and only these.

    The ledger keeps their rows, dropped as `forgotten`. What was wished is kept in OUT/forgotten.json: a later
    `darkroom data build --force` in the same place leaves them out, too. Models that were trained before are not
    changed. All options may be repeated.
    """
    from training.data.forget import forget as forget_samples
    from training.data.storage import Folder

    opt_outs = _opt_outs(hashes or [], creators or [], domains or [])
    done = forget_samples(Folder.at(dataset).place, opt_outs, dry_run=dry_run)
    if as_json:
        counts = {"inputs": done.inputs, "samples": done.samples, "shards": list(done.shards)}
        print_json({"path": dataset, "dry_run": dry_run, **counts, "hash": done.manifest.hash})
        return
    _say(dataset, done, dry_run=dry_run)


def _say(dataset: str, done: Forgotten, *, dry_run: bool) -> None:
    place = printable_path(dataset)
    if done.leftovers:
        typer.echo(f"Removed {done.leftovers} files that an interrupted call had left.")
    if not done.inputs:
        kept = "" if dry_run else "; it is noted, and will be obeyed when the data set is built again"
        typer.echo(f"Nothing in {place} matched{kept}.")
        return
    would, others = "would be " if dry_run else "", done.inputs - done.samples
    typer.echo(f"{done.samples} sample(s) in {len(done.shards)} shard(s) {would}taken out of {place}.")
    if others:
        typer.echo(f"{others} row(s) of the ledger that were dropped before {would}marked, too.")
    if not dry_run:
        typer.echo(f"The data set is now {done.manifest.hash}, with {done.manifest.kept} samples.")


def _opt_outs(hashes: list[str], creators: list[str], domains: list[str]) -> list[OptOut]:
    """The wishes, dated today.

    Raises:
        UsageError: none, or one that can mean nothing.
    """
    import re
    from datetime import UTC, datetime

    from training.data.clean.consent import domain_name, folded
    from training.data.forgotten import OptOut
    from training.errors import UsageError

    wrong = next((value for value in hashes if not re.fullmatch(r"[0-9a-fA-F]{64}", value)), None)
    if wrong is not None:
        raise UsageError("--hash is not a sha256.", value=wrong, rule="64 hexadecimal digits, as `sha256sum` prints")
    if not all(folded(value) for value in creators):
        raise UsageError("--creator is empty.", rule="a name; an empty one would mean all who state none")
    wrong = next((value for value in domains if not domain_name(value)), None)
    if wrong is not None:
        raise UsageError("--domain is not a domain.", value=wrong, rule="a host's name, such as example.com")
    today = datetime.now(UTC).date().isoformat()
    found = [OptOut(selector="hash", value=value.lower(), when=today) for value in hashes]
    found += [OptOut(selector="creator", value=value, when=today) for value in creators]
    found += [OptOut(selector="domain", value=domain_name(value), when=today) for value in domains]
    if not found:
        raise UsageError("Nothing is named.", rule="at least one selector", options=["--hash", "--creator", "--domain"])
    return found
