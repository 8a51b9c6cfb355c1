"""What an audit has found."""

from __future__ import annotations

from dataclasses import dataclass, field

from training.data.audit_findings import Finding


@dataclass
class EpochUse:
    """One epoch, in which each sample of the split is due once.

    Attributes:
        due: rows that the steps so far were to read.
        used: rows that are shown to have been trained on.
        skipped: rows whose sample could not be read.
        exact: once it is over, whether its rows were every sample once; None where that was not counted.
    """

    due: int = 0
    used: int = 0
    skipped: int = 0
    exact: bool | None = None


@dataclass
class SkippedSample:
    """A sample that could not be read.

    Attributes:
        name: as messages call it.
        source: the input that it was built from; empty where that is not known.
        reason: why, as the run said; empty where it said nothing.
        epochs: in which it was due and left out.
    """

    name: str
    source: str = ""
    reason: str = ""
    epochs: list[int] = field(default_factory=list)


@dataclass
class UndoneSteps:
    """Steps in a row whose rows were consumed and are not in the weights, since their updates were undone.

    Attributes:
        first: the first of them.
        last: the last one.
        reason: why, as the run said; empty where it said nothing.
    """

    first: int
    last: int
    reason: str = ""


@dataclass
class AuditReport:
    """What an audit has found.

    Attributes:
        run: the run's folder.
        dataset: the data set's.
        data_hash: its name.
        split: what was trained on.
        samples: of the split.
        steps: steps that count.
        consumed: rows that are shown to have been trained on, in steps that were undone afterwards as well.
        lost: rows that were due and are not shown to have been used.
        duplicated: rows that were used though they were not due.
        redone: steps that were done again after an interruption.
        digest: the ledger's running digest.
        undone: steps that were undone after they were taken, in the order in which that happened; a step that was
            taken back again later is in two of them.
        skipped: samples that could not be read, by id.
        epochs: by number.
        findings: everything that is wrong; empty where all is well.
    """

    run: str
    dataset: str
    data_hash: str
    split: str
    samples: int
    steps: int
    consumed: int = 0
    lost: int = 0
    duplicated: int = 0
    redone: int = 0
    digest: str = ""
    undone: list[UndoneSteps] = field(default_factory=list)
    skipped: dict[int, SkippedSample] = field(default_factory=dict)
    epochs: dict[int, EpochUse] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def undone_steps(self) -> int:
        """Steps that are not in the weights, each counted once."""
        return len({step for each in self.undone for step in range(each.first, each.last + 1)})
