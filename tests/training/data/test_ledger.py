"""The ledger has a row for every input, whatever the inputs are, and its sums are the manifest's."""

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.training.data.ledgers import read_ledger
from training.data import ledger as ledger_module
from training.data.build import build
from training.data.config import BuildConfig
from training.data.executor import LocalExecutor
from training.data.ledger import LedgerRow, LedgerWriter, read_tables
from training.data.manifest import read_manifest
from training.errors import DataError

Encode = Callable[..., bytes]

KINDS = ("good", "copy", "broken", "cut", "tiny", "orphan", "bad sidecar", "no caption")


def _write(folder: Path, number: int, kind: str, encode: Encode) -> None:
    picture = folder / f"{number:02d}.png"
    data = encode(0 if kind == "copy" else number + 1, size=(8, 8) if kind == "tiny" else (40, 30))
    if kind == "broken":
        data = b"no picture"
    elif kind == "cut":
        data = data[: len(data) // 2]
    if kind == "orphan":
        picture.with_suffix(".txt").write_text("no picture of this name")
        return
    picture.write_bytes(data)
    if kind == "bad sidecar":
        picture.with_suffix(".json").write_text("[")
    elif kind != "no caption":
        picture.with_suffix(".txt").write_text(f"picture {number}")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.sampled_from(KINDS), max_size=20), held_out=st.sampled_from([0.0, 0.3]), block=st.integers(1, 9)
)
def test_totals_add_up_over_any_mix(kinds: list[str], held_out: float, block: int, encode: Encode) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "source"), Path(folder, "out")
        source.mkdir()
        for number, kind in enumerate(["good", "good", "good", *kinds]):
            _write(source, number, kind, encode)
        try:
            manifest = build(source, out, BuildConfig(held_out=held_out), executor=LocalExecutor(1), block_inputs=block)
        except DataError as error:
            assume("held-out split" not in str(error))  # chance left nothing to train on
            raise
        rows = list(read_ledger(out))
        assert [row.number for row in rows] == list(range(3 + len(kinds)))
        assert len(rows) == manifest.inputs == manifest.kept + sum(manifest.dropped.values())
        assert Counter(row.rule for row in rows if not row.kept) == manifest.dropped
        assert all(
            (row.rule is None) == row.kept == (row.shard is not None) == (row.offset is not None) for row in rows
        )
        for name, split in manifest.splits.items():
            assert sum(row.split == name for row in rows) == split.count
        assert manifest.kept == sum(manifest.licences.values())
        assert manifest.without_caption == sum(row.kept and not row.caption for row in rows)
        assert all(row.sha256 for row in rows if row.kept)


@given(st.lists(st.integers(0, 7), max_size=12))
def test_equal_rows_give_equal_bytes_however_they_come(sizes: list[int]) -> None:
    rows = [LedgerRow(number, f"{number}.png", kept=number % 2 == 0, phash=2**64 - 1) for number in range(sum(sizes))]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_module, "_GROUP_ROWS", 5)
        with LedgerWriter(Path(folder, "one")) as writer:
            writer.add(rows)
        with LedgerWriter(Path(folder, "many")) as writer:
            for size in sizes:
                writer.add(rows[:size])
                rows = rows[size:]
        assert Path(folder, "one").read_bytes() == Path(folder, "many").read_bytes()
        groups = pq.read_metadata(Path(folder, "one")).num_row_groups
        assert groups == -(-sum(sizes) // 5)


def test_columns_can_be_read_alone(built: Path) -> None:
    (table,) = read_tables(built, ["number", "rule"])
    assert table.column_names == ["number", "rule"]
    assert table.num_rows == read_manifest(built).inputs


def test_a_damaged_ledger_is_a_clear_error(built: Path, tmp_path: Path) -> None:
    for path in built.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "ledger.parquet").write_bytes(b"PAR1 and so on")
    with pytest.raises(DataError, match="ledger cannot be read"):
        list(read_ledger(tmp_path))
