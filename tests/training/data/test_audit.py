"""The audit against ledgers of simulated runs: undisturbed, interrupted in every way, and tampered with."""

import functools
import types
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.audit import compare, saved_digests
from training.data.audit_findings import Finding
from training.data.audit_plan import Plan
from training.data.audit_report import AuditReport
from training.data.buckets import Bucket, Members
from training.data.schedule import Schedule
from training.data.storage import Folder
from training.data.use_digest import RowHash, Use
from training.data.use_ledger import DTYPE, MISSING, STEP, STEPS, UseLedger, UseState, after
from training.data.use_records import UseRecords

HASH, SAMPLES, BATCH = "ab" * 32, 22, 8
SHAPE = Bucket(8, 8, 8)
PREFIXES = np.random.default_rng(0).integers(0, 2**63, SAMPLES, dtype=np.uint64)


@functools.cache
def schedule_of(counts: tuple[int, ...] = (SAMPLES,)) -> Schedule:
    ids = None if len(counts) == 1 else np.random.default_rng(1).permutation(SAMPLES)
    members = Members((SHAPE,) * len(counts), counts, ids)
    return Schedule(members, global_batch=BATCH, seed=3, block=4, window=2)


class Simulated:
    """A run that trains nothing: ranks read their rows, and rank 0 keeps the ledger."""

    def __init__(
        self, folder: Path, counts: tuple[int, ...] = (SAMPLES,), unreadable: frozenset[int] = frozenset()
    ) -> None:
        self.folder, self.schedule, self.unreadable = folder, schedule_of(counts), unreadable
        self.saved = UseState()

    def train(
        self,
        last: int,
        world: int = 1,
        batch_of: Callable[[int], int] = lambda step: step - 1,
        undone: Mapping[int, tuple[int, int]] = types.MappingProxyType({}),
    ) -> UseState:
        """From the last checkpoint to a step; what is not saved afterwards is lost."""
        ledger, _ = UseLedger.open(self.folder, HASH, self.saved)
        for step in range(self.saved.step + 1, last + 1):
            shares, missing = [], []
            batch = self.schedule.batch(batch_of(step))
            for rank in range(world):
                ids, epochs = batch.ids[rank::world], batch.epochs[rank::world].tolist()
                valid = [sample not in self.unreadable for sample in ids.tolist()]
                shares.append(RowHash(HASH).use(epochs, ids.tolist(), valid, PREFIXES[ids]))
                rows = zip(ids.tolist(), epochs, valid, strict=True)
                missing += [(sample, epoch) for sample, epoch, good in rows if not good]
            use = Use.of_parts([sum(each) for each in zip(*(share.parts() for share in shares), strict=True)])
            ledger.commit(step, (step - 1) * BATCH, use, missing, undone.get(step))
        ledger.close()
        return ledger.state

    def save(self, state: UseState) -> None:
        self.saved = state

    def audit(self, at_least: int = 0) -> AuditReport:
        records = UseRecords(self.path, at_least)
        report = AuditReport("run", "data", HASH, "train", SAMPLES, records.steps, redone=records.redone)
        compare(records, Plan(self.schedule, PREFIXES, RowHash(HASH)), report, lambda *_: None)
        return report

    @property
    def path(self) -> Path:
        return self.folder / "use" / STEPS

    def records(self) -> np.ndarray:
        return np.frombuffer(self.path.read_bytes()[DTYPE.itemsize :], DTYPE).copy()

    def rewrite(self, records: np.ndarray, *, sealed: bool = True) -> None:
        """Put other records in place of the file's, as someone would who knows the format, or who does not."""
        running = bytes(16)
        for record in records if sealed else ():
            if record["kind"] == STEP:
                running = after(running, record)
            record["running"] = np.frombuffer(running, "<u8")
            record["check"] = zlib.crc32(record.tobytes()[:-4])
        self.path.write_bytes(self.path.read_bytes()[: DTYPE.itemsize] + records.tobytes())


@pytest.fixture
def run(tmp_path: Path) -> Simulated:
    """Twelve steps without interruption: four epochs and a half."""
    simulated = Simulated(tmp_path)
    simulated.save(simulated.train(12))
    return simulated


def totals(report: AuditReport) -> tuple[int, int, list[str]]:
    return report.lost, report.duplicated, [finding.kind for finding in report.findings]


def only(report: AuditReport) -> Finding:
    (finding,) = report.findings
    return finding


@pytest.mark.parametrize("counts", [(SAMPLES,), (9, 13), (8, 3, 11)])
def test_an_undisturbed_run_is_clean(tmp_path: Path, counts: tuple[int, ...]) -> None:
    simulated = Simulated(tmp_path, counts)
    simulated.train(30)
    report = simulated.audit()
    assert totals(report) == (0, 0, [])
    assert (report.steps, report.consumed, report.redone) == (30, 30 * BATCH, 0)
    assert report.epochs[0].exact
    assert report.epochs[0].used == SAMPLES
    assert sum(epoch.due for epoch in report.epochs.values()) == 30 * BATCH


@settings(max_examples=60)
@given(
    parts=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.sampled_from([1, 2, 4, 8])), max_size=8),
    unreadable=st.frozensets(st.integers(0, SAMPLES - 1), max_size=3),
    counts=st.sampled_from([(SAMPLES,), (9, 13)]),
)
def test_whatever_interrupts_a_run_nothing_is_lost_or_duplicated(
    tmp_path_factory: pytest.TempPathFactory,
    parts: list[tuple[int, int, int]],
    unreadable: frozenset[int],
    counts: tuple[int, ...],
) -> None:
    """Each part goes on from the last checkpoint in a world of some size, saves one, does more, and is killed."""
    simulated = Simulated(tmp_path_factory.mktemp("run"), counts, unreadable)
    redone = 0
    for saved, more, world in [*parts, (1, 0, 1)]:
        simulated.save(simulated.train(simulated.saved.step + saved, world))
        simulated.train(simulated.saved.step + more, world)
        redone += more
    report = simulated.audit()
    assert totals(report) == (0, 0, [])
    assert (report.steps, report.redone) == (simulated.saved.step, redone)
    assert set(report.skipped) <= unreadable
    assert report.consumed + sum(len(sample.epochs) for sample in report.skipped.values()) == report.steps * BATCH
    undisturbed = Simulated(tmp_path_factory.mktemp("whole"), counts, unreadable)
    assert undisturbed.train(report.steps).digest == simulated.saved.digest


def test_an_unreadable_sample_is_skipped_once_in_each_epoch_and_is_no_finding(tmp_path: Path) -> None:
    simulated = Simulated(tmp_path, unreadable=frozenset({5}))
    simulated.train(11, world=2)
    report = simulated.audit()
    assert totals(report) == (0, 0, [])
    assert [(sample.name, sample.epochs) for sample in report.skipped.values()] == [("train[5]", [0, 1, 2, 3])]
    assert [(epoch.due, epoch.used, epoch.skipped, epoch.exact) for epoch in report.epochs.values()] == [
        (SAMPLES, SAMPLES - 1, 1, True)
    ] * 4


def test_the_name_of_a_sample_that_was_left_out_can_be_damaged_too(tmp_path: Path) -> None:
    simulated = Simulated(tmp_path, unreadable=frozenset({5}))
    simulated.train(3)
    records = simulated.records()
    named = np.flatnonzero(records["kind"] == MISSING)[0]
    records["digest"][named, 0] += 70_000
    simulated.rewrite(records, sealed=False)
    report = simulated.audit()
    step = int(records["step"][named])
    assert [(finding.kind, finding.step) for finding in report.findings] == [
        ("damaged", step),
        ("skipped", step),
        ("sample", step),
    ]
    assert "did not consume sample 5" in report.findings[-1].message
    assert 70_005 not in report.skipped


def test_steps_that_were_undone_are_told_once_however_often_they_were_done(tmp_path: Path) -> None:
    simulated = Simulated(tmp_path, unreadable=frozenset({5}))
    simulated.save(simulated.train(4, undone={3: (3, 3)}))
    simulated.train(8, undone={6: (6, 6), 8: (5, 8)})
    simulated.train(9, undone={8: (5, 8)})
    report = simulated.audit()
    assert totals(report) == (0, 0, [])
    assert [(each.first, each.last) for each in report.undone] == [(3, 3), (5, 8)]
    assert report.undone_steps == 5


@pytest.mark.parametrize("sealed", [False, True])
def test_a_record_that_was_removed_is_missed(run: Simulated, sealed: bool) -> None:
    run.rewrite(np.delete(run.records(), 4), sealed=sealed)
    report = run.audit()
    assert totals(report) == (BATCH, 0, ["missing"])
    assert only(report).message == "There is no record of step 5."
    assert report.consumed == 11 * BATCH


def test_records_that_were_cut_off_are_missed_where_a_checkpoint_knows_better(run: Simulated) -> None:
    run.rewrite(run.records()[:9])
    assert totals(run.audit()) == (0, 0, [])
    report = run.audit(at_least=12)
    assert totals(report) == (3 * BATCH, 0, ["missing"])
    assert only(report).message == "There is no record of steps 10 to 12."


@pytest.mark.parametrize("place", [5, 12])
def test_a_record_that_is_there_twice_is_a_batch_that_was_used_twice(run: Simulated, place: int) -> None:
    records = run.records()
    run.rewrite(np.insert(records, place, records[4]), sealed=False)
    report = run.audit()
    assert totals(report) == (0, BATCH, ["repeated"])
    assert "two records of step 5" in only(report).message


def test_a_flipped_bit_is_a_damaged_record(run: Simulated) -> None:
    records = run.records()
    records["digest"][6, 0] ^= 1
    run.rewrite(records, sealed=False)
    report = run.audit()
    assert totals(report) == (BATCH, 0, ["damaged", "missing"])
    assert {finding.step for finding in report.findings} == {7}


def test_an_altered_record_with_a_checksum_of_its_own_does_not_fit_the_chain(run: Simulated) -> None:
    records = run.records()
    records["rows"][6] -= 1
    records["check"][6] = zlib.crc32(records[6].tobytes()[:-4])
    run.rewrite(records, sealed=False)
    report = run.audit()
    assert totals(report) == (0, 0, ["altered", "counts"])
    assert {finding.step for finding in report.findings} == {7}
    assert "its record says 7 rows, 0 unreadable, at position 48, not 8 rows" in report.findings[1].message


@pytest.mark.parametrize("epoch_away", [0, 1])
def test_a_sample_that_was_swapped_is_found(run: Simulated, epoch_away: int) -> None:
    batch = run.schedule.batch(6)
    instead_of, epoch = int(batch.ids[2]), int(batch.epochs[2])
    used = next(sample for sample in range(SAMPLES) if sample not in batch.ids)
    swap(run, 7, (epoch, instead_of), (epoch + epoch_away, used))
    report = run.audit()
    assert totals(report) == (1, 1, ["sample"])
    assert only(report) == Finding(
        "sample", 7, f"Step 7 consumed sample {used} instead of sample {instead_of}.", (instead_of,), (used,)
    )


def swap(run: Simulated, step: int, out: tuple[int, int] | None, into: tuple[int, int] | None) -> None:
    """Give a step the digest that it would have with another row, and everything after it what follows from it."""
    records = run.records()
    for row in (out, into):
        if row is not None:
            (change,) = RowHash(HASH).rows(np.array([row[0]]), np.array([row[1]]), PREFIXES[[row[1]]])
            records["digest"][step - 1] += change if row is into else -change
    records["rows"][step - 1] = int(records["rows"][step - 1]) + (into is not None) - (out is not None)
    run.rewrite(records)


def test_a_row_too_few_and_a_row_too_many_are_found(run: Simulated) -> None:
    due = run.schedule.batch(3)
    lost, epoch = int(due.ids[0]), int(due.epochs[0])
    swap(run, 4, (epoch, lost), None)
    more = run.schedule.batch(9)
    swap(run, 10, None, (int(more.epochs[1]), int(more.ids[1])))
    report = run.audit()
    assert totals(report) == (1, 1, ["sample", "sample"])
    first, second = report.findings
    assert first.message == f"Step 4 did not consume sample {lost}, and no record says why."
    assert second.message == f"Step 10 consumed sample {more.ids[1]} in addition to its own."


def test_a_repeated_batch_is_named_by_its_step(tmp_path: Path) -> None:
    simulated = Simulated(tmp_path)
    simulated.train(12, batch_of=lambda step: 4 if step == 8 else step - 1)
    report = simulated.audit()
    assert totals(report) == (BATCH, BATCH, ["batch"])
    assert only(report).message == "Step 8 consumed the batch of step 5 instead of its own."
    assert set(only(report).lost) == set(simulated.schedule.batch(7).ids.tolist())


def test_a_batch_that_was_passed_over_is_one_lost_batch(tmp_path: Path) -> None:
    """All later steps are one ahead, but each of those batches was used once."""
    simulated = Simulated(tmp_path)
    simulated.train(12, batch_of=lambda step: step - 1 if step < 6 else step)
    report = simulated.audit()
    assert (report.lost, report.duplicated) == (BATCH, 0)
    assert [finding.step for finding in report.findings] == list(range(6, 13))
    assert report.findings[0].message == "Step 6 consumed the batch of step 7 instead of its own."


def test_two_swapped_samples_leave_a_step_unexplained_and_name_what_was_due(run: Simulated) -> None:
    batch = run.schedule.batch(1)
    others = [sample for sample in range(SAMPLES) if sample not in batch.ids]
    for row in (0, 1):
        swap(run, 2, (int(batch.epochs[row]), int(batch.ids[row])), (0, others[row]))
    report = run.audit()
    assert totals(report) == (BATCH, 0, ["unexplained"])
    assert only(report).lost == tuple(batch.ids.tolist())


def test_many_wrong_steps_are_told_in_few_words(run: Simulated) -> None:
    more = Simulated(run.folder / "more")
    more.train(60)
    records = more.records()
    records["digest"][10:] ^= np.uint64(12345)
    more.rewrite(records)
    report = more.audit()
    assert report.lost == 50 * BATCH
    assert len(report.findings) == 21
    assert report.findings[-1].message == "30 more steps, the first of them 31, did not consume their own samples."


def test_a_step_done_again_with_other_samples_is_found(tmp_path: Path) -> None:
    simulated = Simulated(tmp_path)
    simulated.save(simulated.train(3))
    simulated.train(6, batch_of=lambda step: step + 20)
    simulated.train(8)
    report = simulated.audit()
    assert totals(report) == (0, 0, ["redone"] * 3)
    assert report.redone == 3


def test_a_row_that_was_left_out_though_it_was_not_due_is_found(tmp_path: Path) -> None:
    simulated = Simulated(tmp_path, unreadable=frozenset({5}))
    simulated.train(3)
    records = simulated.records()
    named = np.flatnonzero(records["kind"] == MISSING)[0]
    step = int(records["step"][named])
    other = next(sample for sample in range(SAMPLES) if sample not in simulated.schedule.batch(step - 1).ids)
    records["digest"][named] = (other, 0)
    simulated.rewrite(records)
    report = simulated.audit()
    assert "skipped" in [finding.kind for finding in report.findings]
    assert f"left out sample {other} of epoch 0, which was not due" in report.findings[0].message


def test_a_plan_that_is_no_permutation_is_found(run: Simulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """The count of each epoch's samples does not trust the schedule that it looks at."""
    honest = Schedule._rows

    def repeating(self: Schedule, *given: object) -> tuple[np.ndarray, np.ndarray]:
        ids, epochs = honest(self, *given)  # type: ignore[arg-type]
        return np.where(ids == 7, 8, ids), epochs

    monkeypatch.setattr(Schedule, "_rows", repeating)
    schedule_of.cache_clear()
    again = Simulated(run.folder / "again")
    again.train(3)
    finding = only(again.audit())
    schedule_of.cache_clear()
    assert finding.message == "The plan of epoch 0 leaves out [7] and repeats [8]."


def test_a_checkpoint_that_goes_while_it_is_looked_at_is_passed_over_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    whole, damaged = (tmp_path / "checkpoints" / f"step-{step:08d}" / "checkpoint.json" for step in (6, 9))
    whole.write_text('{"step": 6, "about": {"use": {"digest": "ab"}}}')
    for content in ("", '{"step": 9}', "[]", "\udcff"):
        damaged.write_bytes(content.encode("utf-8", "surrogateescape"))
        digests, findings = saved_digests(Folder.at(tmp_path / "checkpoints"))
        assert digests == {6: "ab"}
        assert [(finding.kind, finding.step) for finding in findings] == [("checkpoint", 9)]
        assert str(damaged) in findings[0].message
