"""Whose turn it is: which images the next call of the network advances.

Every accepted image can be advanced at any step and left alone at any other: nothing is lost, it waits where it is.
So the policy is preemptive. Each image has a time by which it is due,

    due = arrived + priority * priority_s + stretch * (seconds of the device that it still needs)

and the image that is due first goes first: the short before the long (SRPT, Schrage 1968), the urgent before the
patient, and each of them only for a while, because nobody's due time moves away while it waits. **No starvation**:
whoever arrives after an image is due comes behind it. A deadline pulls the due time forward to the last moment at
which the image could be begun and still be in time (EDF, Liu and Layland 1973).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from serving.bucket import Bucket


class SchedulingConfig(BaseModel):
    """Whose turn it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stretch: float = Field(default=10.0, ge=0, le=1000, allow_inf_nan=False)
    """How many times the work that an image needs it can be made to wait for shorter ones; 0 is first come, first
    served."""
    priority_s: float = Field(default=2.0, ge=0, allow_inf_nan=False)
    """Seconds of waiting that one level of priority is worth."""


@dataclass(frozen=True)
class Call:
    """One call of the network.

    Attributes:
        rows: how many it takes, always.
        seconds: how long it takes; 0 where nobody knows yet.
    """

    rows: int
    seconds: float


class Candidate(Protocol):
    """An image that was accepted and is not finished."""

    @property
    def bucket(self) -> Bucket:
        """Whom it may share a call with."""

    @property
    def arrived_s(self) -> float:
        """When its request was accepted."""

    @property
    def place(self) -> int:
        """Which of its request's images, from 1: the work of those before it counts as its own."""

    @property
    def priority(self) -> int:
        """0, the most urgent, to 9."""

    @property
    def deadline_at_s(self) -> float | None:
        """When nobody wants it any more."""

    @property
    def evaluations_left(self) -> int:
        """How often the network is still asked about it."""

    @property
    def takes(self) -> int:
        """Rows of a call: two with guidance."""


T = TypeVar("T", bound=Candidate)


@dataclass(frozen=True)
class Scheduler:
    """A pure function of the images that are here.

    Attributes:
        config: whose turn it is.
        call_of: what a call costs in a bucket.
    """

    config: SchedulingConfig
    call_of: Callable[[Bucket], Call]

    def choose(self, candidates: Iterable[T]) -> list[T]:
        """The images that the next step advances: of one bucket, and no more than fill a call of it.

        Of the buckets, it is the turn of the one whose first image is due first, where a call that is not full costs
        the images in it the more.
        """
        waiting: defaultdict[Bucket, list[T]] = defaultdict(list)
        for each in candidates:
            waiting[each.bucket].append(each)
        steps = [self._filled(bucket, members) for bucket, members in waiting.items()]
        return min(steps, key=self._rank, default=[])

    def hopeless(self, candidates: Iterable[T], now_s: float) -> list[T]:
        """Those that would miss their deadline even if every step from now on were theirs."""
        return [
            each
            for each in candidates
            if each.deadline_at_s is not None and now_s + self.seconds_left(each) > each.deadline_at_s
        ]

    def seconds_left(self, candidate: Candidate) -> float:
        """What it still needs if every step from now on is its."""
        call = self.call_of(candidate.bucket)
        return candidate.evaluations_left * math.ceil(candidate.takes / call.rows) * call.seconds

    def device_s(self, candidate: Candidate) -> float:
        """What it still needs of the device, in calls that are full."""
        call = self.call_of(candidate.bucket)
        return candidate.evaluations_left * candidate.takes / call.rows * call.seconds

    def _filled(self, bucket: Bucket, members: Sequence[T]) -> list[T]:
        """The first of a bucket and whoever fits beside it."""
        rows = self.call_of(bucket).rows
        ordered = sorted(members, key=lambda each: (self._due_s(each, rows), each.arrived_s, each.place))
        free = max(rows, ordered[0].takes)
        step = []
        for each in ordered:
            if each.takes <= free:
                step.append(each)
                free -= each.takes
            if not free:
                break
        return step

    def _rank(self, step: Sequence[T]) -> tuple[float, float, int]:
        """Steps in the order of their turns."""
        first = step[0]
        return self._due_s(first, sum(each.takes for each in step)), first.arrived_s, first.place

    def _due_s(self, candidate: Candidate, rows: int) -> float:
        """When it is due, if the ``rows`` of its calls share what they cost."""
        call = self.call_of(candidate.bucket)
        calls = math.ceil(max(rows, candidate.takes) / call.rows)
        share = min(1.0, candidate.takes / rows)
        work_s = candidate.evaluations_left * candidate.place * calls * call.seconds * share
        due_s = candidate.arrived_s + candidate.priority * self.config.priority_s + self.config.stretch * work_s
        if candidate.deadline_at_s is None:
            return due_s
        return min(due_s, candidate.deadline_at_s - self.seconds_left(candidate))
