"""Requests replayed against a policy in virtual time: a call takes what a table says, and nothing is computed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from serving.bucket import Bucket
from serving.scheduling import Call, Scheduler, SchedulingConfig
from training import noise

SQUARE = Bucket(8, 8)
WIDE = Bucket(8, 16)


@dataclass(eq=False)
class Image:
    """What a policy sees of an image, and what became of it."""

    evaluations_left: int
    arrived_s: float = 0.0
    bucket: Bucket = SQUARE
    takes: int = 2
    place: int = 1
    priority: int = 5
    deadline_at_s: float | None = None
    finished_s: float = 0.0
    steps: int = field(init=False)

    def __post_init__(self) -> None:
        self.steps = self.evaluations_left

    @property
    def latency_s(self) -> float:
        return self.finished_s - self.arrived_s


@dataclass
class Replay:
    """What happened.

    Attributes:
        calls: of the network.
        rows: that belonged to images.
        padded_rows: that the network was run on.
        seconds: until the last image was finished.
        late: images that were given up, in order.
        turns: when each call began, and for whom.
    """

    calls: int = 0
    rows: int = 0
    padded_rows: int = 0
    seconds: float = 0.0
    late: list[Image] = field(default_factory=list)
    turns: list[tuple[float, tuple[Image, ...]]] = field(default_factory=list)


def scheduler(table: Mapping[Bucket, Call], **settings: float) -> Scheduler:
    return Scheduler(SchedulingConfig(**settings), table.__getitem__)


def replay(policy: Scheduler, images: Sequence[Image]) -> Replay:
    """Every image's fate when each step is the policy's choice."""
    told, now = Replay(), 0.0
    coming = sorted(images, key=lambda image: image.arrived_s)
    here: list[Image] = []
    while coming or here:
        if not here:
            now = max(now, coming[0].arrived_s)
        while coming and coming[0].arrived_s <= now:
            here.append(coming.pop(0))
        late = policy.hopeless(here, now)
        told.late.extend(late)
        here = [image for image in here if image not in late]
        chosen = policy.choose(here)
        if not chosen:
            continue
        told.turns.append((now, tuple(chosen)))
        now = _advance(told, chosen, policy.call_of(chosen[0].bucket), now)
        here = [image for image in here if image.evaluations_left]
    told.seconds = now
    return told


def replay_static(table: Mapping[Bucket, Call], images: Sequence[Image]) -> Replay:
    """The same when a batch is taken as it stands and run to its end, as by ``@serve.batch`` over a pipeline.

    A pipeline's call has one number of steps and one size, and is guided or not: a batch is the oldest image and those
    that ask for the same.
    """
    told, now = Replay(), 0.0
    coming = sorted(images, key=lambda image: image.arrived_s)
    while coming:
        now = max(now, coming[0].arrived_s)
        first = (coming[0].steps, coming[0].bucket, coming[0].takes)
        here = [image for image in coming if image.arrived_s <= now]
        here = [image for image in here if (image.steps, image.bucket, image.takes) == first]
        call = table[here[0].bucket]
        batch = here[: max(1, call.rows // here[0].takes)]
        coming = [image for image in coming if image not in batch]
        for _ in range(batch[0].steps):
            now = _advance(told, batch, call, now)
    told.seconds = now
    return told


def _advance(told: Replay, images: Sequence[Image], call: Call, now: float) -> float:
    rows = sum(image.takes for image in images)
    calls = -(-rows // call.rows)
    told.calls += calls
    told.rows += rows
    told.padded_rows += calls * call.rows
    now += calls * call.seconds
    for image in images:
        image.evaluations_left -= 1
        image.finished_s = now
    return now


def poisson(
    count: int,
    load: float,
    table: Mapping[Bucket, Call],
    *,
    steps: Sequence[int] = (4, 20, 50),
    takes: Sequence[int] = (1, 2),
    seed: int = 0,
) -> list[Image]:
    """Images of every kind, arriving at so much of what full calls could do."""
    draw = noise.generator(seed, "arrivals")
    kinds = [(each, bucket, rows) for each in steps for bucket in table for rows in takes]
    work_s = statistics.mean(each * rows * table[bucket].seconds / table[bucket].rows for each, bucket, rows in kinds)
    now, images = 0.0, []
    for _ in range(count):
        now += float(draw.exponential(work_s / load))
        chosen, bucket, rows = kinds[int(draw.integers(len(kinds)))]
        images.append(Image(chosen, now, bucket, rows))
    return images


def mean_latency_s(images: Sequence[Image], steps: int) -> float:
    return statistics.mean(image.latency_s for image in images if image.steps == steps)


def percentile_latency_s(images: Sequence[Image], share: float) -> float:
    return sorted(image.latency_s for image in images)[int(share * (len(images) - 1))]
