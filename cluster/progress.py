"""How training shows itself: a bar with images/s and the time left, or a line now and then without a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cluster.console import say, stderr

_COMPARED = {
    "actual_over_forecast/images_per_s": "rate {:.2f} of the forecast's",
    "actual_over_forecast/memory_bytes": "memory {:.2f} of the forecast's",
}

PLAIN_EVERY_S = 15.0
"""Without a terminal, how often a line of progress is printed."""


class TrainProgress:
    """Follows the events of a run, or of a sweep's trials side by side.

    Args:
        steps: optimizer steps of each.
        global_batch: images per step.
        began_s: wall-clock time at which the command began, for the account of the start.
    """

    def __init__(self, steps: int, global_batch: int, began_s: float) -> None:
        self.steps, self.global_batch, self.began_s = steps, global_batch, began_s
        self.marks: list[tuple[str, float]] = []
        self._console = stderr()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}  {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._printed_s = 0.0
        self._forked_s: dict[str, float] = {}

    def __enter__(self) -> TrainProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def mark(self, name: str, time_s: float | None = None) -> None:
        """Note a moment of the start."""
        self.marks.append((name, time_s or time.time()))

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Show one event."""
        label = event.get("label") or ""
        before = f"trial {label}: " if label else ""
        kind = event["event"]
        if kind == "mark":
            self._on_mark(event, label)
        elif kind == "step":
            self._on_step(event, label)
        elif kind == "encoding":
            self._on_encoding(event, label)
        elif kind == "evaluation" and event["metrics"]:
            self._say(f"{before}step {event['step']}: held-out loss {event['metrics']['held_out_loss']:.4f}")
        elif kind == "resumed":
            self._say(f"{before}resumed at step {event['step']} from {event['path']}")
        elif kind in ("warning", "info"):
            self._say(f"{before}{event['message']}")
        elif kind == "trial":
            loss = "-" if event["loss"] is None else f"{event['loss']:.4f}"
            self._say(f"{before}{event['status']} at step {event['step']}, held-out loss {loss} {event['reason']}")
        elif kind == "account":
            for line in account(event):
                self._say(f"{before}{line}")
        elif kind == "error":
            self._say(f"{before}{event['message'].splitlines()[0]}")

    def _say(self, text: str) -> None:
        if self._console.is_terminal:
            self._bar.console.print(text, markup=False, soft_wrap=True)
        else:
            say(text)

    def _on_mark(self, event: Mapping[str, Any], label: str) -> None:
        if label:
            if event["name"] == "process forked":
                self._forked_s[label] = event["time_s"]
            elif event["name"] == "first step":
                seconds = event["time_s"] - self._forked_s[label]
                self._say(f"trial {label}: first step {seconds:.1f} s after its process was forked")
            return
        self.mark(event["name"], event["time_s"])
        if event["name"] == "first step":
            self._say(self.account())

    def _on_encoding(self, event: Mapping[str, Any], label: str) -> None:
        """Captions that nobody has encoded yet; the steps wait for them."""
        task, done, total = f"{label} captions", event["done"], event["total"]
        if task not in self._tasks:
            what = f"trial {label}: encoding captions" if label else "encoding captions"
            self._tasks[task] = self._bar.add_task(what, total=total, rate="", loss="")
        self._bar.update(self._tasks[task], completed=done, visible=done < total)
        if not self._console.is_terminal and time.monotonic() - self._printed_s > PLAIN_EVERY_S:
            self._printed_s = time.monotonic()
            say(f"{f'trial {label}: ' if label else ''}encoding captions: {done:,} of {total:,} samples")

    def account(self) -> str:
        """Where the time until the first step went."""
        parts, last = [], self.began_s
        for name, moment in self.marks:
            parts.append(f"{name} {moment - last:.1f}")
            last = moment
        return f"first step after {last - self.began_s:.1f} s: " + ", ".join(parts)

    def _on_step(self, event: Mapping[str, Any], label: str) -> None:
        metrics, step = event["metrics"], event["step"]
        rate, loss = f"{metrics['images_per_s']:.0f} images/s", f"loss {metrics.get('loss', float('nan')):.4f}"
        if label not in self._tasks:
            description = f"trial {label}" if label else "training"
            # begun at the resumed step, so that the time left is not told from steps of an earlier run
            self._tasks[label] = self._bar.add_task(description, total=self.steps, completed=step, rate="", loss="")
        self._bar.update(self._tasks[label], completed=step, rate=rate, loss=loss)
        if not self._console.is_terminal and time.monotonic() - self._printed_s > PLAIN_EVERY_S:
            self._printed_s = time.monotonic()
            left_s = (self.steps - step) * self.global_batch / max(metrics["images_per_s"], 1e-9)
            say(f"{f'trial {label}: ' if label else ''}step {step}/{self.steps}  {rate}  {loss}  {left_s:.0f} s left")


def account(event: Mapping[str, Any]) -> list[str]:
    """Where the time of a run's steps went, and what it has cost, in lines for people."""
    sections, steps, metrics = event["time_s"], event["steps"], event["metrics"]
    parts = ", ".join(f"{name} {1000 * seconds / steps:.1f}" for name, seconds in sections.items())
    hours = {name: metrics[f"cost/{name}_hours"] for name in ("gpu", "cpu")}
    used = [f"{value:.3f} {name.upper()} hours" for name, value in hours.items() if value]
    if "cost/money" in metrics:
        used.append(f"{metrics['cost/money']:.2f} {event['currency']}")
    if "cost/energy_kwh" in metrics:
        used.append(f"{metrics['cost/energy_kwh']:.4f} kWh, {1000 * metrics['cost/co2_kg']:.1f} g CO2")
    lines = [f"milliseconds a step: {parts}", f"the run has used {', '.join(used)}"]
    compared = [text.format(metrics[name]) for name, text in _COMPARED.items() if name in metrics]
    return [*lines, *([", ".join(compared)] if compared else [])]
