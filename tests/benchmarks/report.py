"""What every benchmark prints and writes: ours, the peer, the ratio, the floor, and the machine's load."""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One figure."""

    name: str
    unit: str
    ours: float
    peer: float | None
    peer_name: str
    ratio: float | None
    goal: str
    met: bool


def row(name: str, unit: str, ours: list[float], peer: list[float], peer_name: str, goal: str, met: bool) -> Row:
    """A row of medians; the ratio is ours over the peer's."""
    middle = statistics.median(ours)
    other = statistics.median(peer) if peer else None
    ratio = round(middle / other, 3) if other else None
    return Row(name, unit, round(middle, 3), None if other is None else round(other, 3), peer_name, ratio, goal, met)


def parser(description: str) -> argparse.ArgumentParser:
    """``--json FILE`` and ``--rounds N``."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="write the rows to this file")
    made.add_argument("--rounds", type=int, default=3, help="how often each side is measured, alternating")
    return made


def arguments(description: str) -> argparse.Namespace:
    """The options that every benchmark has."""
    return parser(description).parse_args()


def publish(rows: list[Row], file: Path | None) -> None:
    """Print the rows, and write them where asked."""
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for each in rows:
        against = f"  {each.peer_name} {each.peer} {each.unit}  ratio {each.ratio}" if each.peer is not None else ""
        print(f"{each.name}: {each.ours} {each.unit}{against}  goal {each.goal}: {'met' if each.met else 'MISSED'}")
    if file:
        file.write_text(json.dumps([asdict(each) for each in rows], indent=1) + "\n")
