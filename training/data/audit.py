"""The audit of a run: does its ledger of use agree with what the data set and the recipe prescribe?

A verifier of its own: it computes which samples every step must have consumed from the recipe and the index, never
from what the training process said, and compares digests. Memory is bounded by blocks of rows and, for data sets
that fit, one byte per sample and epoch in work; a step costs 64 bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from training import checkpoint
from training.checkpoint import CheckpointConfig
from training.data.audit_findings import MOST, Finding, Progress, Suspect, explain, of_flaw
from training.data.audit_names import sources_of
from training.data.audit_pictures import check_index, check_pictures
from training.data.audit_plan import Plan
from training.data.audit_report import AuditReport, EpochUse, SkippedSample, UndoneSteps
from training.data.dataset import Dataset
from training.data.loader_config import LoaderConfig
from training.data.schedule import Schedule
from training.data.storage import Folder
from training.data.use_digest import RowHash
from training.data.use_ledger import FOLDER, RECIPE, STEPS, data_hash_of
from training.data.use_records import UseRecords
from training.errors import DataError
from training.left_out import reasons as reasons_of_undone
from training.skipped import reasons

COUNTED = 1 << 28
"""Samples of a split, at most, whose uses are counted one by one."""


def audit(
    run_dir: Path, data: str | None = None, *, verify: bool = False, progress: Progress = lambda *_: None
) -> AuditReport:
    """Compare a run's ledger with its data set.

    Args:
        run_dir: the run's folder.
        data: where the data set is, if not where the recipe says.
        verify: read every picture, too, and compare its sha256 with the index.
        progress: told now and then.

    Raises:
        DataError: the run has no ledger, or the data set is not the one that it was trained on.
    """
    recipe, ledger = _recipe(run_dir), run_dir / FOLDER / STEPS
    kept = checkpoint.place(CheckpointConfig.model_validate(recipe["config"].get("checkpoint", {})), run_dir)
    digests, damaged = saved_digests(kept)  # before the ledger, which a run that is under way may prolong meanwhile
    records = UseRecords(ledger, at_least=max(digests, default=0))
    config, loader = recipe["config"], LoaderConfig.model_validate(recipe["config"]["data"])
    place = data or loader.path
    dataset = Dataset.open(place, loader.disk_cache)
    for what, known in ((ledger, data_hash_of(ledger)), (run_dir / FOLDER / RECIPE, recipe["data_hash"])):
        _require_same(dataset, known, what)
    schedule = Schedule.open(
        dataset,
        loader,
        resolution=config["model"]["resolution"],
        global_batch=config["global_batch"],
        seed=config["seed"],
        split=recipe["split"],
    )
    plan = Plan(schedule, check_index(dataset, recipe["split"]), RowHash(dataset.hash))
    report = AuditReport(str(run_dir), str(place), dataset.hash, recipe["split"], plan.samples, records.steps)
    report.redone, report.digest = records.redone, records.running(records.steps) or ""
    report.findings += damaged
    for step, digest in digests.items():
        if records.running(step) != digest:
            said = f"The ledger does not lead to the checkpoint of step {step}: its digest is {digest}"
            report.findings.append(Finding("checkpoint", step, f"{said}, the ledger's {records.running(step)}."))
    compare(records, plan, report, progress)
    for sample, source in sources_of(dataset, recipe["split"], report.skipped).items():
        report.skipped[sample].source = source
    for sample, reason in reasons(run_dir):
        if sample in report.skipped:
            report.skipped[sample].reason = reason
    undone_for = dict(reasons_of_undone(run_dir))
    for undone in report.undone:
        undone.reason = undone_for.get((undone.first, undone.last), "")
    if verify:
        report.findings += check_pictures(dataset.split(recipe["split"]), set(report.skipped), progress)
    return report


def _require_same(dataset: Dataset, known: str, what: Path) -> None:
    if dataset.hash != known:
        raise DataError(
            "The run was trained on another data set.",
            value=f"{dataset.path}: {dataset.hash}",
            rule=f"data hash {known}, as in {what}",
            mend="--data names the folder of the data set that it began with; one that was built again, or that"
            " `darkroom data forget` has changed, is another",
        )


def _recipe(run_dir: Path) -> dict[str, Any]:
    path = run_dir / FOLDER / RECIPE
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            "The run has no ledger of use.",
            value=str(run_dir),
            rule=f"the folder of a run that has begun, with {FOLDER}/{RECIPE}",
            mend="name a run of `darkroom train`, or its folder",
        ) from error
    return found


def saved_digests(kept: Folder) -> tuple[dict[int, str], list[Finding]]:
    """The running digest that each checkpoint names, by step; and the checkpoints that cannot be read."""
    digests: dict[int, str] = {}
    damaged: list[Finding] = []
    for name in kept.names("step-"):
        folder, _, file = name.partition("/")
        if file != checkpoint.MANIFEST:
            continue
        try:
            digests[int(folder[len("step-") :])] = str(json.loads(kept.read(name))["about"]["use"]["digest"])
        except FileNotFoundError:  # a run that is under way has just removed it
            continue
        except (ValueError, KeyError, TypeError) as error:
            step = folder[len("step-") :].lstrip("0")
            said = f"The checkpoint's manifest {kept.url(name)} cannot be read: {error!r}."
            damaged.append(Finding("checkpoint", int(step) if step.isdigit() else 0, said))
    return digests, damaged


def compare(records: UseRecords, plan: Plan, report: AuditReport, progress: Progress) -> None:
    """Put into the report what the ledger says of each step, and where the plan says something else."""
    report.findings += [of_flaw(flaw) for flaw in records.flaws]
    _Comparison(records, plan, report, progress).run()


class _Comparison:
    """The steps looked at so far.

    Attributes:
        suspects: steps whose digest is not that of their own samples.
        uses: how often each sample was due, by epochs that are not over.
    """

    def __init__(self, records: UseRecords, plan: Plan, report: AuditReport, progress: Progress) -> None:
        self.records, self.plan, self.report, self.progress = records, plan, report, progress
        self.suspects: list[Suspect] = []
        self.uses: dict[int, np.ndarray] = {}

    def run(self) -> None:
        report, plan = self.report, self.plan
        for first, stop in plan.blocks(report.steps):
            self._block(first, stop)
            self.progress("comparing steps", stop - 1, report.steps)
        for step in self.records.done_otherwise():
            said = f"Step {step} consumed other samples when it was done again."
            report.findings.append(Finding("redone", step, said))
        report.undone = [UndoneSteps(first, last) for first, last in self.records.left_out()]
        findings, losses = explain(self.suspects, plan, report.steps, self.progress)
        report.findings += findings
        for flaw in self.records.flaws:
            if flaw.kind == "missing":
                losses.lost += (flaw.last - flaw.first + 1) * plan.global_batch
            elif flaw.kind == "repeated":
                losses.duplicated += plan.global_batch
        report.lost, report.duplicated = losses.lost, losses.duplicated
        report.findings.sort(key=lambda finding: finding.step)

    def _block(self, first: int, stop: int) -> None:
        ids, epochs = self.plan.rows(first, stop)
        expected = self.plan.digests(epochs, ids)
        records, there = self.records.of(first, stop)
        left_out = np.zeros(ids.shape, dtype=bool)
        for row in np.flatnonzero(there & (records["missing"] > 0)).tolist():
            left_out[row] = self._left_out(first + row, ids[row], epochs[row])
            expected[row] -= self.plan.hashes(epochs[row], ids[row])[left_out[row]].sum(axis=0, dtype=np.uint64)
        same = (records["digest"] == expected).all(axis=1)
        for row in np.flatnonzero(there & ~same).tolist():
            digest, own = records["digest"][row].tolist(), expected[row].tolist()
            self.suspects.append(Suspect(first + row, tuple(digest), tuple(own)))
        counts = np.stack([records["rows"], records["missing"], records["position"]], axis=1)
        places = (np.arange(first, stop) - 1) * self.plan.global_batch
        own_counts = np.stack([(~left_out).sum(axis=1), left_out.sum(axis=1), places], axis=1)
        for row in np.flatnonzero(there & same & (counts != own_counts).any(axis=1)).tolist():
            said = f"Step {first + row} consumed its own samples, but its record says {_counts(counts[row])}"
            self.report.findings.append(Finding("counts", first + row, f"{said}, not {_counts(own_counts[row])}."))
        good = (there & same)[:, None] & ~left_out
        self.report.consumed += int(good.sum())
        self._count(ids, epochs, good, left_out)

    def _left_out(self, step: int, ids: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Which rows of a step could not be read, as its records say."""
        named = {(int(sample), int(epoch)) for sample, epoch in self.records.missing(step)}
        due = list(zip(ids.tolist(), epochs.tolist(), strict=True))
        for sample, epoch in sorted(named.difference(due)):
            said = f"Step {step} left out sample {sample} of epoch {epoch}, which was not due."
            self.report.findings.append(Finding("skipped", step, said))
        for sample, epoch in sorted(named.intersection(due)):
            name = f"{self.report.split}[{sample}]"
            self.report.skipped.setdefault(sample, SkippedSample(name)).epochs.append(epoch)
        return np.array([pair in named for pair in due])

    def _count(self, ids: np.ndarray, epochs: np.ndarray, good: np.ndarray, left_out: np.ndarray) -> None:
        """Add a block's rows to their epochs', and look whether an epoch that is over had every sample once."""
        ids, good, left_out = ids.ravel(), good.ravel(), left_out.ravel()
        by_epoch = np.argsort(epochs, axis=None, kind="stable")  # a block of a small data set holds very many epochs
        numbers, starts = np.unique(epochs.ravel()[by_epoch], return_index=True)
        for epoch, rows in zip(numbers.tolist(), np.split(by_epoch, starts[1:]), strict=True):
            of = self.report.epochs.setdefault(epoch, EpochUse())
            of.due += len(rows)
            of.used += int(good[rows].sum())
            of.skipped += int(left_out[rows].sum())
            if self.plan.samples > COUNTED:
                continue
            uses = self.uses.setdefault(epoch, np.zeros(self.plan.samples, dtype=np.uint8))
            np.add.at(uses, ids[rows], 1)
            if of.due == self.plan.samples:
                of.exact = bool((uses == 1).all())
                if not of.exact:
                    never, twice = np.flatnonzero(uses == 0)[:MOST].tolist(), np.flatnonzero(uses > 1)[:MOST].tolist()
                    said = f"The plan of epoch {epoch} leaves out {never} and repeats {twice}."
                    self.report.findings.append(Finding("order", 0, said, tuple(never), tuple(twice)))
                del self.uses[epoch]


def _counts(row: np.ndarray) -> str:
    rows, missing, position = row.tolist()
    return f"{rows} rows, {missing} unreadable, at position {position}"
