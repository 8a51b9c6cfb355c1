"""The page: one file that asks nobody for anything, runs no script, and takes strangers' text for text."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from pathlib import PurePosixPath

from jinja2 import Environment, StrictUndefined

from training.data.report import bias, charts
from training.data.report.bias import FieldAudit, Group
from training.data.report.numbers import Numbers
from training.data.report.pictures import PER_RULE, Pictures, Shown

_BAR_PX = 120
"""Width of the small bars and intervals in tables."""


def page(numbers: Numbers, pictures: Pictures) -> str:
    """The report as HTML. Equal reports give equal pages.

    The content security policy allows the page's one style sheet, by its hash, and pictures inside the page; so even
    a mistake in escaping could load or run nothing.
    """
    style = _part("page.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    html = _environment().from_string(_part("page.html"))
    return html.render(
        n=numbers,
        p=pictures,
        title=PurePosixPath(numbers.place).name or numbers.place,
        style=style,
        policy=f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        charts=[charts.chart(histogram) for histogram in numbers.histograms],
        c=charts,
        bias=bias,
        bar_px=_BAR_PX,
        per_rule=PER_RULE,
        flow=_flow(numbers),
    )


@cache
def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "count": lambda value: f"{value:,}",
        "percent": _percent,
        "number": lambda value: f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}",
        "words": lambda rule: rule.replace("_", " "),
        "megabytes": lambda size: f"{size / 1e6:,.1f} MB",
        "source": _source,
        "clean": _clean,
        "scale": _axis,
    }
    return environment


def _part(name: str) -> str:
    return files("training.data.report").joinpath(name).read_text(encoding="utf-8")


def _percent(share: float) -> str:
    """A share in percent; what is not all is never shown as 100 %, nor what is not nothing as 0 %."""
    if 0 < share < 0.0005:
        return "<0.1 %"
    if 0.9995 <= share < 1:
        return ">99.9 %"
    return f"{100 * share:.1f} %" if share not in {0.0, 1.0} else f"{100 * share:.0f} %"


def _source(shown: Shown) -> str:
    """The picture's address: the picture itself."""
    return f"data:image/webp;base64,{base64.b64encode(shown.webp or b'').decode()}"


def _clean(text: str) -> str:
    """Text that UTF-8 can hold, without control characters; marks for the direction of text end with their element."""
    told = text.encode("utf-8", "replace").decode()
    return "".join(letter if ord(letter) >= 32 and letter != "\x7f" else " " for letter in told)


def _flow(numbers: Numbers) -> list[tuple[str, float, float, str]]:
    """The bar of all inputs: (class, start, width, title) of each part, in percent."""
    parts = [("kept", numbers.kept, "kept"), *(("dropped", one.count, one.rule) for one in numbers.dropped)]
    found, start = [], 0.0
    for kind, count, name in parts:
        width = 100 * count / numbers.inputs if numbers.inputs else 0.0
        found.append((kind, start, width, f"{name.replace('_', ' ')}: {count:,}"))
        start += width
    return found


def _axis(audit: FieldAudit) -> tuple[float, float]:
    """The range of the intervals of a field, so that small differences show: (lowest share, highest share)."""
    named: list[Group] = list(audit.groups)
    low, high = min(group.kept_low for group in named), max(group.kept_high for group in named)
    room = max(0.02, 0.08 * (high - low))
    return max(0.0, low - room), min(1.0, high + room)
