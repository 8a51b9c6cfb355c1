"""The ledger of use: what it keeps through crashes and resumptions, and the digest in it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.use_digest import RowHash, Use
from training.data.use_ledger import DTYPE, STEPS, UseLedger, UseState
from training.data.use_records import UseRecords
from training.errors import DataError, StorageError

HASH = "ab" * 32
ROWS = 4


def use_of(step: int, rows: int = ROWS) -> Use:
    """What a step consumes in these tests."""
    ids = np.arange(step * ROWS, step * ROWS + rows)
    return RowHash(HASH).use([0] * rows, ids.tolist(), [True] * rows, ids * 7)


def train(run: Path, state: UseState, last: int) -> list[UseState]:
    """Commit steps up to ``last``; the states after each."""
    ledger, _ = UseLedger.open(run, HASH, state)
    states = []
    for step in range(state.step + 1, last + 1):
        ledger.commit(step, (step - 1) * ROWS, use_of(step), [])
        states.append(ledger.state)
    ledger.flush()
    ledger.close()
    return states


def flaws(run: Path) -> list[tuple[str, int, int]]:
    return [dataclasses.astuple(flaw) for flaw in UseRecords(run / "use" / STEPS).flaws]


def whole(run: Path) -> Path:
    return run / "use" / STEPS


rows = st.lists(
    st.tuples(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 2**64 - 1), st.booleans()), max_size=40
)


def added(parts: Sequence[Use]) -> Use:
    return Use.of_parts([sum(numbers) for numbers in zip(*(each.parts() for each in parts), strict=True)])


@given(rows=rows, world=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_digest_is_the_same_for_any_number_of_ranks_and_any_order(
    rows: list[tuple[int, int, int, bool]], world: int, seed: int
) -> None:
    def use(some: list[tuple[int, int, int, bool]]) -> Use:
        epochs, ids, prefixes, valid = [list(column) for column in zip(*some, strict=True)] or [[], [], [], []]
        return RowHash(HASH).use(epochs, ids, valid, np.array(prefixes, dtype=np.uint64))

    shuffled = [rows[place] for place in np.random.default_rng(seed).permutation(len(rows))]
    parts = added([use(shuffled[rank::world]) for rank in range(world)])
    assert parts == use(rows)
    assert (parts.rows, parts.missing) == (sum(row[3] for row in rows), sum(not row[3] for row in rows))


@given(rows=rows.filter(len), place=st.integers(0, 39), part=st.integers(0, 3))
def test_another_sample_epoch_or_picture_is_another_digest(
    rows: list[tuple[int, int, int, bool]], place: int, part: int
) -> None:
    def digest(some: list[tuple[int, int, int, bool]]) -> tuple[int, int]:
        epochs, ids, prefixes, valid = (list(column) for column in zip(*some, strict=True))
        return RowHash(HASH).use(epochs, ids, valid, np.array(prefixes, dtype=np.uint64)).digest

    row = list(rows[place % len(rows)])
    row[part] = (not row[3]) if part == 3 else row[part] ^ 1
    if part != 3 and not row[3]:
        return  # a row that is left out is in no digest
    changed = [*rows]
    changed[place % len(rows)] = tuple(row)  # type: ignore[call-overload]
    lanes = zip(digest(changed), digest(rows), strict=True)
    assert all(one != other for one, other in lanes), "each lane tells them apart"


def test_halves_of_a_thousand_ranks_fit_the_integers_that_ranks_add() -> None:
    most = Use(2**20, 0, (2**64 - 1, 2**64 - 1))
    total = [1000 * number for number in most.parts()]
    assert max(total) < 2**63
    assert Use.of_parts(total).digest == ((1000 * (2**64 - 1)) % 2**64,) * 2


@given(ends=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 200)), max_size=6))
def test_wherever_a_run_is_killed_the_end_is_that_of_an_undisturbed_one(
    tmp_path_factory: pytest.TempPathFactory, ends: list[tuple[int, int, int]]
) -> None:
    """Each process saves a checkpoint, takes more steps and dies in the middle of a record, or of several."""
    run, undisturbed = tmp_path_factory.mktemp("killed"), tmp_path_factory.mktemp("whole")
    states = [UseState()]
    redone = 0
    for saved, more, torn in ends:
        known = states[-1].step
        states += train(run, states[-1], known + saved)
        after_it = train(run, states[-1], states[-1].step + more)
        size = whole(run).stat().st_size
        cut = min(torn, more * DTYPE.itemsize)
        with whole(run).open("r+b") as file:
            file.truncate(size - cut)
        redone += len(after_it) - -(-cut // DTYPE.itemsize)
    states += train(run, states[-1], states[-1].step + 1)
    assert train(undisturbed, UseState(), states[-1].step)[-1] == states[-1]
    records = UseRecords(whole(run))
    assert records.flaws == []
    assert (records.steps, records.redone) == (states[-1].step, redone)
    for state in states:
        assert records.running(state.step) == state.digest


def test_a_tail_of_nothing_but_zeros_is_cut(tmp_path: Path) -> None:
    """What a power cut leaves of writes that never reached the disk."""
    states = train(tmp_path, UseState(), 3)
    with whole(tmp_path).open("ab") as file:
        file.write(bytes(2 * DTYPE.itemsize + 5))
    train(tmp_path, states[-1], 4)
    assert flaws(tmp_path) == []
    assert UseRecords(whole(tmp_path)).steps == 4


def test_rows_that_were_left_out_are_kept_by_name(tmp_path: Path) -> None:
    ledger, wrong = UseLedger.open(tmp_path, HASH, UseState())
    assert wrong is None
    ledger.commit(1, 0, use_of(1), [])
    ledger.commit(2, 4, Use(2, 2, (1, 2)), [(5, 0), (7, 1)])
    assert (ledger.state.rows, ledger.state.missing) == (6, 2)
    ledger.close()
    records = UseRecords(whole(tmp_path))
    assert records.missing(2).tolist() == [[5, 0], [7, 1]]
    assert records.missing(1).tolist() == []


def test_a_kill_between_a_name_and_its_step_leaves_no_name(tmp_path: Path) -> None:
    ledger, _ = UseLedger.open(tmp_path, HASH, UseState())
    ledger.commit(1, 0, use_of(1), [])
    kept = ledger.state
    ledger.commit(2, 4, Use(3, 1, (1, 2)), [(5, 0)])
    ledger.close()
    with whole(tmp_path).open("r+b") as file:
        file.truncate(whole(tmp_path).stat().st_size - 1)
    train(tmp_path, kept, 2)
    assert UseRecords(whole(tmp_path)).missing(2).tolist() == []
    assert flaws(tmp_path) == []


def test_a_ledger_that_was_lost_is_told_and_leaves_a_gap(tmp_path: Path) -> None:
    states = train(tmp_path, UseState(), 5)
    whole(tmp_path).unlink()
    ledger, wrong = UseLedger.open(tmp_path, HASH, states[-1])
    assert wrong is not None
    assert "does not lead to the checkpoint of step 5" in wrong
    ledger.commit(6, 20, use_of(6), [])
    ledger.close()
    assert flaws(tmp_path) == [("missing", 1, 5)]
    other, _ = UseLedger.open(tmp_path, "cd" * 32, UseState())
    other.close()
    assert len(UseRecords(whole(tmp_path))._place_of) == 0, "another data set's ledger starts anew"


def test_a_header_that_is_damaged_costs_no_record(tmp_path: Path) -> None:
    states = train(tmp_path, UseState(), 5)
    content = whole(tmp_path).read_bytes()
    whole(tmp_path).write_bytes(b"?" * DTYPE.itemsize + content[DTYPE.itemsize :])
    ledger, wrong = UseLedger.open(tmp_path, HASH, states[-1])
    ledger.close()
    assert wrong is None
    assert whole(tmp_path).read_bytes() == content


def test_a_run_that_begins_anew_leaves_nothing_of_the_former(tmp_path: Path) -> None:
    train(tmp_path, UseState(), 5)
    ledger, _ = UseLedger.open(tmp_path, HASH, UseState(), anew=True)
    ledger.close()
    assert whole(tmp_path).stat().st_size == DTYPE.itemsize


def test_a_ledger_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "use").write_text("in the way")
    with pytest.raises(StorageError, match="The ledger of use cannot be written") as raised:
        UseLedger.open(tmp_path, HASH, UseState())
    assert str(tmp_path / "use" / STEPS) in str(raised.value)
    assert "make room" in str(raised.value)


def test_a_full_disk_ends_a_step_in_words() -> None:
    with Path("/dev/full").open("r+b", buffering=0) as full, pytest.raises(StorageError, match="No space left"):
        UseLedger(full, Path("/dev/full"), UseState()).commit(1, 0, use_of(1), [])


def test_what_is_no_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no ledger of use"):
        UseRecords(tmp_path / "none")
    (tmp_path / "other").write_bytes(b"x" * 640)
    with pytest.raises(DataError, match="This is not a ledger of use"):
        UseRecords(tmp_path / "other")
