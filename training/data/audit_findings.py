"""What an audit says of a step whose digest is not the one that its samples have: which samples it was instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from training.data.audit_plan import BLOCK_ROWS, Plan
from training.data.use_records import Flaw

MOST = 20
"""Steps that are searched for a sample that was swapped, and steps and samples that a finding names."""
AHEAD = 64
"""Batches after the last step that a step may have taken instead of its own."""

Progress = Callable[[str, int, int], None]
"""Told what is done, how much of it, and of how much."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        kind: one word for scripts.
        step: where, 0 for the run as a whole.
        message: for people.
        lost: sample ids that were due and are not shown to have been used, the first few.
        duplicated: sample ids that were used though they were not due, the first few.
    """

    kind: str
    step: int
    message: str
    lost: tuple[int, ...] = ()
    duplicated: tuple[int, ...] = ()


@dataclass(frozen=True)
class Suspect:
    """A step whose record is not what its samples make.

    Attributes:
        step: its number.
        digest: the recorded one.
        expected: what is left of its own after its unreadable rows were taken out.
    """

    step: int
    digest: tuple[int, int]
    expected: tuple[int, int]


@dataclass
class Losses:
    """Rows that were due and not used, and used and not due."""

    lost: int = 0
    duplicated: int = 0


def of_flaw(flaw: Flaw) -> Finding:
    """What a flaw of the file means."""
    steps = f"step {flaw.first}" if flaw.first == flaw.last else f"steps {flaw.first} to {flaw.last}"
    text = {
        "damaged": f"The record of {steps} is damaged: its checksum differs.",
        "missing": f"There is no record of {steps}.",
        "repeated": f"There are two records of {steps}, and no interruption between them.",
        "altered": f"The record of {steps} was altered, or one before it: its running digest does not follow.",
    }
    return Finding(flaw.kind, flaw.first, text[flaw.kind])


def explain(suspects: list[Suspect], plan: Plan, steps: int, progress: Progress) -> tuple[list[Finding], Losses]:
    """Say what each suspect consumed: another step's batch, one other sample, one too many or too few."""
    if not suspects:
        return [], Losses()
    batches = _of_other_steps(suspects, plan, steps + AHEAD, progress)
    losses = _count_batches(suspects, batches, plan.global_batch, steps)
    findings: list[Finding] = []
    for suspect in suspects:
        if (other := batches.get(suspect.step)) is not None:
            ids = plan.rows(suspect.step, suspect.step + 1)[0][0].tolist() if len(findings) < MOST else []
            said = f"Step {suspect.step} consumed the batch of step {other} instead of its own."
            findings.append(Finding("batch", suspect.step, said, lost=tuple(ids[:MOST])))
    rest = [suspect for suspect in suspects if suspect.step not in batches]
    for finding in _of_single_samples(rest[:MOST], plan, progress):
        findings.append(finding)
        losses.lost += len(finding.lost) if finding.kind == "sample" else plan.global_batch
        losses.duplicated += len(finding.duplicated)
    if rest[MOST:]:
        said = f"{len(rest) - MOST} more steps, the first of them {rest[MOST].step}, did not consume their own samples."
        findings.append(Finding("unexplained", rest[MOST].step, said))
        losses.lost += (len(rest) - MOST) * plan.global_batch
    return findings, losses


def _of_other_steps(suspects: list[Suspect], plan: Plan, steps: int, progress: Progress) -> dict[int, int]:
    """Suspects whose digest is another step's, and which."""
    wanted = np.array([suspect.digest for suspect in suspects], dtype=np.uint64)
    sorted_by = np.argsort(wanted[:, 0])
    found: dict[int, int] = {}
    for first, stop in plan.blocks(steps):
        ids, epochs = plan.rows(first, stop)
        digests = plan.digests(epochs, ids)
        for row, place in _matches(digests, wanted, sorted_by):
            found.setdefault(suspects[place].step, first + row)
        progress("looking for other steps' batches", stop - 1, steps)
    return found


def _matches(hashes: np.ndarray, wanted: np.ndarray, sorted_by: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of a row of ``hashes`` and one of ``wanted`` that are equal in both lanes."""
    lane = wanted[sorted_by, 0]
    left, right = np.searchsorted(lane, hashes[:, 0], "left"), np.searchsorted(lane, hashes[:, 0], "right")
    pairs = []
    for row in np.flatnonzero(right > left).tolist():
        places = sorted_by[left[row] : right[row]].tolist()
        pairs += [(row, place) for place in places if wanted[place, 1] == hashes[row, 1]]
    return pairs


def _count_batches(suspects: list[Suspect], batches: dict[int, int], rows: int, steps: int) -> Losses:
    """Batches that no step consumed, and that two did, where the suspects' ones are known."""
    used = Counter(batches.values())
    not_own = {suspect.step for suspect in suspects}
    lost = sum(1 for step in batches if not used[step])
    twice = sum(count - (step in not_own) for step, count in used.items() if step <= steps)
    return Losses(lost * rows, twice * rows)


def _of_single_samples(suspects: list[Suspect], plan: Plan, progress: Progress) -> list[Finding]:
    """Look through all samples for one that explains the difference of a digest.

    A batch with ``b`` instead of ``a`` has the digest ``expected - h(a) + h(b)``; with one row too many or too few,
    a term is missing. So what is looked for among all ``h(b)`` is ``digest - expected + h(a)`` for each ``a``.
    """
    if not suspects:
        return []
    targets, origins, epochs = [], [], set()
    found: dict[int, Finding] = {}
    for number, suspect in enumerate(suspects):
        ids, due = (each[0] for each in plan.rows(suspect.step, suspect.step + 1))
        difference = np.array(suspect.digest, np.uint64) - np.array(suspect.expected, np.uint64)
        own = plan.hashes(due, ids)
        for row in np.flatnonzero((own + difference == 0).all(axis=1)).tolist():
            found[suspect.step] = _single(suspect.step, int(ids[row]), None)
        targets += [difference[None], own + difference]
        origins += [(number, None), *((number, int(sample)) for sample in ids)]
        epochs |= {int(epoch) + near for epoch in np.unique(due) for near in (-1, 0, 1)}
    wanted = np.concatenate(targets)
    sorted_by = np.argsort(wanted[:, 0])
    for first in range(0, plan.samples, BLOCK_ROWS):
        candidates = np.arange(first, min(first + BLOCK_ROWS, plan.samples))
        for epoch in sorted(epochs - {-1}):
            hashes = plan.hashes(np.full_like(candidates, epoch), candidates)
            for row, place in _matches(hashes, wanted, sorted_by):
                number, instead_of = origins[place]
                step = suspects[number].step
                found.setdefault(step, _single(step, instead_of, int(candidates[row])))
        progress("looking for swapped samples", int(candidates[-1]) + 1, plan.samples)
    return [found.get(suspect.step) or _unexplained(suspect, plan) for suspect in suspects]


def _single(step: int, lost: int | None, used: int | None) -> Finding:
    if lost is None:
        said = f"Step {step} consumed sample {used} in addition to its own."
    elif used is None:
        said = f"Step {step} did not consume sample {lost}, and no record says why."
    else:
        said = f"Step {step} consumed sample {used} instead of sample {lost}."
    return Finding("sample", step, said, *(() if each is None else (each,) for each in (lost, used)))


def _unexplained(suspect: Suspect, plan: Plan) -> Finding:
    ids = plan.rows(suspect.step, suspect.step + 1)[0][0].tolist()
    named = ", ".join(map(str, ids[:MOST])) + (", ..." if len(ids) > MOST else "")
    said = f"Step {suspect.step} did not consume its own samples, which are {named}."
    return Finding("unexplained", suspect.step, said, lost=tuple(ids[:MOST]))
