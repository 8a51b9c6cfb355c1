"""Where the marks of a chart go, in the units of its SVG; the template draws them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from training.data.report.histogram import Bin, Histogram, Quantity

WIDTH, HEIGHT = 440, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 14, 42
_GAP = 1.5
_MOST_TICKS = 7
_NICE = (1, 2, 5)


@dataclass(frozen=True)
class Bar:
    """Two boxes on top of each other, and what they say when they are pointed at."""

    x: float
    width: float
    kept_y: float
    kept_height: float
    dropped_y: float
    dropped_height: float
    title: str


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A histogram, laid out.

    Attributes:
        histogram: what it shows.
        bars: kept below, dropped above.
        x_ticks: on the axis of values.
        y_ticks: on the axis of counts.
        threshold: where a rule cut, if that lies within the chart.
        summary: the distribution in words.
    """

    histogram: Histogram
    bars: tuple[Bar, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    threshold: Tick | None
    summary: str


def chart(histogram: Histogram) -> Chart:
    """Lay a histogram out; it has at least one bin."""
    bins = histogram.bins
    tallest = max(bin_.kept + bin_.dropped for bin_ in bins)
    step = _nice_step(tallest)
    top = math.ceil(tallest / step) * step
    room = HEIGHT - TOP - BOTTOM
    base = HEIGHT - BOTTOM
    width = min((WIDTH - LEFT - RIGHT) / len(bins), 48.0)  # a lone bar is no wall
    bars = []
    for number, one in enumerate(bins):
        kept, dropped = one.kept / top * room, one.dropped / top * room
        x, wide = LEFT + number * width + _GAP / 2, max(width - _GAP, 0.5)
        bars.append(Bar(x, wide, base - kept, kept, base - kept - dropped, dropped, _title(histogram.quantity, one)))
    x_ticks = tuple(Tick(LEFT + place * width, label) for place, label in _x_ticks(histogram))
    y_ticks = tuple(Tick(base - count / top * room, f"{count:,}") for count in range(0, top + 1, step))
    return Chart(histogram, tuple(bars), x_ticks, y_ticks, _threshold(histogram, width), _summary(histogram))


def _nice_step(tallest: int) -> int:
    """A round step that gives two to five lines."""
    for exponent in range(20):
        for nice in _NICE:
            if tallest / (nice * 10**exponent) <= 4:
                return int(nice * 10**exponent)
    return tallest


def label(quantity: Quantity, value: float) -> str:
    """A value as its axis shows it."""
    if quantity.name == "aspect":
        return f"{value:.3g} : 1" if value >= 1 else f"1 : {1 / value:.3g}"
    if quantity.name == "bytes":
        power = max(0, min(4, int(math.log2(max(value, 1)) // 10)))
        return f"{value / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
    if quantity.grid == 1 and quantity.scale == "linear":
        return f"{value:,.0f}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _title(quantity: Quantity, one: Bin) -> str:
    whole = quantity.scale == "linear" and quantity.grid == 1
    if whole and one.high - one.low == 1:
        span = label(quantity, one.low)
    else:
        span = f"{label(quantity, one.low)} to {label(quantity, one.high - 1 if whole else one.high)}"
    unit = "" if quantity.name in {"bytes", "aspect"} else f" {quantity.unit}"
    return f"{span}{unit}: {one.kept:,} kept, {one.dropped:,} dropped"


def _x_ticks(histogram: Histogram) -> Iterator[tuple[float, str]]:
    """Places in bins, and labels: powers of two in the middle of their bins, or round numbers."""
    quantity, bins = histogram.quantity, histogram.bins
    if quantity.scale == "log":
        powers = [(number, math.floor(math.log2(one.high))) for number, one in enumerate(bins)]
        inside = [(number, power) for number, power in powers if bins[number].low <= 2.0**power < bins[number].high]
        every = math.ceil(len(inside) / _MOST_TICKS) or 1
        if inside:
            yield from ((n + 0.5, label(quantity, 2.0**power)) for n, power in inside if power % every == 0)
        else:
            yield from ((n + 0.5, label(quantity, math.sqrt(one.low * one.high))) for n, one in enumerate(bins))
        return
    every = next(nice * 10**e for e in range(9) for nice in _NICE if len(bins) / (nice * 10**e) <= _MOST_TICKS)
    first = round(bins[0].low / (bins[0].high - bins[0].low))
    single = quantity.grid == 1 and bins[0].high - bins[0].low == 1
    for number, one in enumerate(bins):
        if (first + number) % every == 0:
            yield number + (0.5 if single else 0.0), label(quantity, one.low)


def _threshold(histogram: Histogram, width: float) -> Tick | None:
    value = histogram.threshold
    if value is None or not histogram.bins[0].low <= value <= histogram.bins[-1].high:
        return None
    for number, one in enumerate(histogram.bins):
        if one.low <= value <= one.high:
            if histogram.quantity.scale == "log":
                part = math.log(value / one.low) / math.log(one.high / one.low)
            else:
                part = (value - one.low) / (one.high - one.low)
            return Tick(LEFT + (number + part) * width, label(histogram.quantity, value))
    return None


def _summary(histogram: Histogram) -> str:
    quantity = histogram.quantity
    if histogram.median is None or histogram.low is None or histogram.high is None:
        return "No kept picture has it."
    middle, low, high = (label(quantity, value) for value in (histogram.median, histogram.low, histogram.high))
    text = f"Kept: median {middle}, nine in ten " + (f"within {low} and {high}." if low != high else "the same.")
    if quantity.help:
        text += f" {quantity.help}"
    if histogram.threshold is not None:
        text += f" Cut at {label(quantity, histogram.threshold)}."
    return text + (
        f" Unknown for {histogram.unknown:,} {'input' if histogram.unknown == 1 else 'inputs'}."
        if histogram.unknown
        else ""
    )
