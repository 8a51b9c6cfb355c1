"""The engine's step-level batching beside a pipeline behind a lock and beside static batches, on one mixed trace.

All serve the same weights over HTTP from one process with one thread of tensor operations: ours; diffusers' pipeline
behind a lock in FastAPI; the same behind Ray Serve's ``@serve.batch``, of the batch size that serves this trace best,
without Serve's proxy, which would only slow it down. Capacity is what full batches of equal requests would do: the
pipeline called directly, at its best width. Requests come as a Poisson process of 4, 20 and 50 steps, two sizes, with
and without guidance; latencies count from the moment that a request should come. A static batch cannot reach that
capacity on a mixed trace, so latencies are also compared at 0.9 of what ``@serve.batch`` itself reaches.

    python -m tests.benchmarks.serving --json serving.json
"""

from __future__ import annotations

import http.client
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.benchmarks.report import Row, parser, publish, row
from tests.benchmarks.serving_trace import CLASSES, SIDES, Answered, mean_cost_s, median_s, replay, trace

BATCH_WIDTHS = (4, 8, 16)
"""Of ``@serve.batch``; the one that serves the trace best is the peer."""
HALF, FULL, OVER = "0.5", "0.9", "1.5"
"""Loads, of capacity."""
OF_BATCH = "0.9 of @serve.batch's"
"""The load that is 0.9 of what static batches reach on this trace."""
ONCE = "once"
"""Everything at once."""
CALLS = 400
"""Requests whose median is an overhead."""


def write_model(out: Path) -> Path:
    """A small network with random weights; what it draws does not matter."""
    import torch

    from training.bundle import Provenance, write_bundle
    from training.canvas import Canvas
    from training.conditioning import ClassEncoder
    from training.models import UNetConfig
    from training.objectives import RectifiedFlow

    torch.manual_seed(0)
    encoder = ClassEncoder(CLASSES)
    config = UNetConfig(resolution=SIDES[0], widths=(32, 64), attention=(False, True), head_width=32, norm_groups=8)
    told = Provenance(
        run_id="none", data_hash="none", recipe={}, created_utc="2026-01-01T00:00:00Z", step=1, code_version="none"
    )
    return write_bundle(
        out,
        network=config.build(encoder.shape),
        encoder=encoder,
        objective=RectifiedFlow(),
        canvas=Canvas(SIDES[0]),
        provenance=told,
    )


def _words(side: str, bundle: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "tests.benchmarks.serving_sides", side, str(bundle), *more]


def figures(side: str, bundle: Path, width: int = 8) -> dict[str, object]:
    """What a side prints."""
    done = subprocess.run(_words(side, bundle, "--width", str(width)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    line = next(each for each in done.stdout.splitlines() if each.startswith("FIGURES "))
    found: dict[str, object] = json.loads(line.removeprefix("FIGURES "))
    return found


@contextmanager
def server(side: str, bundle: Path, width: int) -> Iterator[str]:
    """A side's address, once it answers and both sizes are warm."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(_words(side, bundle, "--port", str(port), "--width", str(width)))
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"{side} stopped with {process.returncode}")
            try:
                httpx.get(url, timeout=5)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        replay(url, trace(1, 12, math.inf))
        yield url
    finally:
        process.terminate()
        process.wait(30)


def call_s(url: str) -> float:
    """Median seconds of a request of one step over a connection that stays open."""
    body = {"prompt": CLASSES[0], "seed": 0, "num_inference_steps": 1, "guidance_scale": 1, "size": "auto"}
    connection = http.client.HTTPConnection(url.removeprefix("http://"))

    def call() -> None:
        connection.request("POST", "/v1/images/generations", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{url} answered {answer.status}")

    return median_s(call, CALLS)


def tell(side: str, load: str, found: Answered) -> None:
    """A line while it runs."""
    print(
        f"{side} at {load}: {len(found.asked)} requests, {found.images_per_s():.2f} images/s, "
        f"p95 {found.p95_s():.2f} s, 4 steps {found.mean_s(4):.2f} s, load {os.getloadavg()[0]:.1f}",
        flush=True,
    )


def best_batch(bundle: Path, burst: int) -> tuple[int, float]:
    """The batch size of ``@serve.batch`` that serves a burst fastest, and its images/s."""
    rates = {}
    for width in BATCH_WIDTHS:
        with server("batch", bundle, width) as url:
            found = replay(url, trace(2, burst, math.inf))
        tell(f"@serve.batch({width})", "once", found)
        rates[width] = found.images_per_s()
    width = max(rates, key=lambda each: rates[each])
    return width, rates[width]


Loads = Mapping[str, Sequence[Answered]]
"""What became of the traces at each load, a trace a round."""


def at_loads(url: str, side: str, rates: Mapping[str, float], seconds: float, rounds: int) -> Loads:
    """The same traces at several rates, each for so many seconds."""
    answered: dict[str, list[Answered]] = {load: [] for load in rates}
    for number in range(rounds):
        for load, per_s in rates.items():
            count = max(40, round(seconds * per_s)) if math.isfinite(per_s) else round(seconds)
            found = replay(url, trace(3 + number, count, per_s))
            tell(side, load, found)
            answered[load].append(found)
    return answered


def latencies(ours: Loads, batch: Loads, locked: Loads) -> list[Row]:
    """Ours beside theirs, load by load."""
    rows = []
    for load in (FULL, OF_BATCH):
        mine, theirs = [each.p95_s() for each in ours[load]], [each.p95_s() for each in batch[load]]
        rows.append(_beside(f"p95 at {load}", mine, theirs, 0.6))
        mine, theirs = [each.mean_s(4) for each in ours[load]], [each.mean_s(4) for each in batch[load]]
        rows.append(_beside(f"mean of 4 steps at {load}", mine, theirs, 0.25))
    half, over = [each.p95_s() for each in ours[HALF]], [each.p95_s() for each in ours[OVER]]
    rows.append(row(f"p95 at {HALF}", "s", half, [each.p95_s() for each in locked[HALF]], "a lock", "-", True))
    rows.append(row(f"p95 at {OVER}", "s", over, [], "", "-", True))
    return rows


def _beside(name: str, ours: list[float], theirs: list[float], most: float) -> Row:
    met = statistics.median(ours) <= most * statistics.median(theirs)
    return row(name, "s", ours, theirs, "@serve.batch", f"<= {most}", met)


def measure(bundle: Path, seconds: float, rounds: int) -> list[Row]:
    """Every side, one after the other."""
    found = figures("static", bundle)
    row_s = {side: float(found[str(side)]["row_s"]) for side in SIDES}  # type: ignore[index]
    width = int(found[str(SIDES[0])]["width"])  # type: ignore[index]
    capacity = 1 / mean_cost_s(row_s)
    print(f"capacity {capacity:.2f} requests/s, full batches of {width}: {found}", flush=True)
    burst = max(40, round(capacity * seconds))
    batch_width, batch_per_s = best_batch(bundle, burst // 2)
    rates = {load: float(load) * capacity for load in (HALF, FULL, OVER)} | {OF_BATCH: 0.9 * batch_per_s}
    with server("ours", bundle, width) as url:
        # so many that the last ones, which no longer fill their calls, do not count for much
        at_once = at_loads(url, "ours", {ONCE: math.inf}, 3 * burst, rounds)[ONCE]
        ours = at_loads(url, "ours", rates, seconds, rounds)
        over_http = call_s(url)
    with server("batch", bundle, batch_width) as url:
        batch = at_loads(url, "@serve.batch", {load: rates[load] for load in (FULL, OF_BATCH)}, seconds, rounds)
    with server("lock", bundle, width) as url:
        locked = at_loads(url, "lock", {HALF: rates[HALF]}, seconds, rounds)
    with server("bare", bundle, width) as url:
        bare = call_s(url)
    engine_s = float(figures("engine", bundle)["p50_s"])  # type: ignore[arg-type]
    share = [each.share(row_s) for each in at_once]
    images = [each.images_per_s() for each in at_once]
    overhead_ms = [1000 * (over_http - engine_s - bare)]
    return [
        row("saturated", "of capacity", share, [1.0], "full batches", ">= 0.97", statistics.median(share) >= 0.97),
        row("saturated", "images/s", images, [batch_per_s], "@serve.batch", "-", True),
        *latencies(ours, batch, locked),
        row("API over engine and bare uvicorn, p50", "ms", overhead_ms, [], "", "<= 1", overhead_ms[0] <= 1),
    ]


def main() -> None:
    """Measure and report."""
    made = parser(__doc__ or "")
    made.add_argument("--seconds", type=float, default=15, help="of each load")
    made.set_defaults(rounds=1)
    options = made.parse_args()
    with tempfile.TemporaryDirectory(prefix="dr-") as folder:
        rows = measure(write_model(Path(folder) / "model"), options.seconds, options.rounds)
    publish(rows, options.json)


if __name__ == "__main__":
    main()
