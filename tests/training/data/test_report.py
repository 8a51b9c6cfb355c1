"""The report: its numbers against plain counting, the choice of what it shows, and the command."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cluster.commands.data import app
from tests.training.data.ledgers import read_ledger
from training.data.build import build
from training.data.config import BuildConfig
from training.data.dataset import Dataset
from training.data.ledger import LedgerRow, LedgerWriter
from training.data.manifest import read_manifest
from training.data.report.histogram import Counts, Quantity
from training.data.report.numbers import Numbers, numbers
from training.data.report.page import page
from training.data.report.pictures import pictures
from training.data.report.rows import choose, rows_at, spread
from training.data.storage import Folder
from training.errors import DataError, UsageError

Encode = Callable[..., bytes]
runner = CliRunner()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, encode: Encode) -> Path:
    """120 pictures of two kinds, of which every tenth is too small and every fifteenth a copy."""
    folder = tmp_path_factory.mktemp("reported")
    lines = []
    for number in range(120):
        side = 8 if number % 10 == 9 else 24
        data = encode(number - 1 if number % 15 == 14 else number, (side + 6, side), kind="PNG")
        (folder / f"p{number:03d}.png").write_bytes(data)
        breed = "cat" if number % 3 else "dog"
        caption = "" if number == 7 else f"{breed} on a mat {'x' * number}"
        tags = ["pet", breed] if number % 2 else ["pet"]
        fields = {"file": f"p{number:03d}.png", "caption": caption, "breed": breed, "tags": tags, "id": number}
        lines.append(json.dumps({**fields, "licence": "MIT"}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    out = tmp_path_factory.mktemp("sets") / "reported"
    build(source, out, BuildConfig(held_out=0.2))
    return out


def counted(dataset: Path, *fields: str) -> Numbers:
    return numbers(Folder.at(dataset), read_manifest(dataset), fields)


def test_the_numbers_are_those_of_plain_counting(reported: Path) -> None:
    rows = list(read_ledger(reported))
    found = counted(reported)
    assert (found.inputs, found.kept) == (120, sum(row.kept for row in rows))
    assert {one.rule: one.count for one in found.dropped} == Counter(row.rule for row in rows if not row.kept)
    assert set(read_manifest(reported).dropped) == {"too_small", "exact_duplicate"}
    assert found.kept + sum(one.count for one in found.dropped) == found.inputs
    histograms = {one.quantity.name: one for one in found.histograms}
    for histogram in histograms.values():
        assert sum(bin_.kept + bin_.dropped for bin_ in histogram.bins) + histogram.unknown == 120
    assert (histograms["shorter_side"].low, histograms["shorter_side"].high) == (24, 24)
    assert histograms["aspect"].median == pytest.approx(30 / 24, rel=0.02)
    lengths = Counter(len(row.caption.split()) for row in rows)
    words = histograms["caption_words"].bins
    assert {bin_.low: bin_.kept + bin_.dropped for bin_ in words if bin_.kept + bin_.dropped} == lengths
    assert found.without_caption == 1
    (audit,) = [audit for audit in found.audits if audit.field == "breed"]
    for group in audit.groups:
        of = [row for row in rows if json.loads(row.fields)["breed"] == group.value]
        assert (group.inputs, group.kept) == (len(of), sum(row.kept for row in of))
    assert {audit.field for audit in found.audits} == {"breed"}
    assert {"tags", "id"} <= set(found.other_fields)


def test_a_field_with_lists_counts_each_value_and_ids_are_never_chosen_unasked(reported: Path) -> None:
    tags, number = counted(reported, "tags", "id").audits
    assert tags.several
    assert [group.value for group in tags.groups] == ["pet", "cat", "dog"]
    assert tags.groups[0].inputs == 120
    assert [group.value for group in number.groups].count(None) == 1
    assert len(number.groups) == 51
    assert sum(group.inputs for group in number.groups) == 120


@settings(deadline=None)
@given(count=st.integers(0, 500), most=st.integers(1, 80))
def test_what_is_shown_is_spread_evenly(count: int, most: int) -> None:
    places = spread(count, most)
    assert len(places) == min(count, most)
    if count:
        assert places[0] == 0
        assert places[-1] == (count - 1 if most > 1 else 0)
    gaps = np.diff(places)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_rows_are_found_across_row_groups(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "set")
    rows = []
    for number in range(20_000):
        kept, split = number % 7 != 3, "held_out" if number % 5 == 0 else "train"
        row = LedgerRow(number, f"p{number}", kept, rule=None if kept else "corrupt")
        rows.append(replace(row, split=split, key=str(number)) if kept else row)  # type: ignore[arg-type]
    with LedgerWriter(tmp_path / "set" / "ledger.parquet") as writer:
        writer.add(rows)
    folder = Folder.at(tmp_path / "set")
    kept_numbers = [row.number for row in rows if row.kept]
    dropped = [row.number for row in rows if not row.kept]
    chosen = choose(folder, {None: len(kept_numbers), "corrupt": len(dropped)}, {None: 50, "corrupt": 9})
    assert chosen[None] == [kept_numbers[place] for place in spread(len(kept_numbers), 50)]
    assert chosen["corrupt"] == [dropped[place] for place in spread(len(dropped), 9)]
    found = rows_at(folder, [*chosen[None], *chosen["corrupt"]])
    for number, one in found.items():
        row = rows[number]
        assert one.row == row
        before = sum(earlier.kept and earlier.split == row.split for earlier in rows[:number])
        assert one.index == (before if row.kept else None)


def test_every_kept_picture_is_the_one_its_caption_speaks_of(reported: Path) -> None:
    dataset = Dataset.open(str(reported))
    found = pictures(dataset, Folder.at(reported), counted(reported))
    assert found.source == ""
    assert len(found.kept) == 72
    assert all(shown.webp for shown in found.kept)
    assert {rule: len(shown) for rule, shown in found.dropped.items()} == {"too_small": 12}
    assert all(shown.webp for shown in found.dropped["too_small"])
    assert [pair.rule for pair in found.pairs] == ["exact_duplicate"] * len(found.pairs)
    assert [(pair.kept.name, pair.copy.name) for pair in found.pairs][:2] == [
        ("p013.png", "p014.png"),
        ("p043.png", "p044.png"),
    ]
    assert all(pair.kept.webp == pair.copy.webp for pair in found.pairs)


def test_without_its_source_the_page_says_so(reported: Path, source: Path, tmp_path: Path) -> None:
    shutil.copytree(reported, tmp_path / "set")
    origin = json.loads((tmp_path / "set" / "origin.json").read_bytes())
    (tmp_path / "set" / "origin.json").write_text(json.dumps({**origin, "source": str(tmp_path / "gone")}))
    result = runner.invoke(app, ["report", str(tmp_path / "set")])
    assert result.exit_code == 0, result.output
    assert "its source is not there any more" in result.stderr
    text = (tmp_path / "set" / "report.html").read_text(encoding="utf-8")
    assert "The pictures themselves are not shown: its source is not there any more" in text
    (tmp_path / "set" / "origin.json").unlink()
    assert "does not say where its source was" in runner.invoke(app, ["report", str(tmp_path / "set")]).stderr


def test_a_picture_that_changed_since_is_not_passed_off_as_the_old_one(
    source: Path, encode: Encode, tmp_path: Path
) -> None:
    shutil.copytree(source, tmp_path / "source")
    build(tmp_path / "source", tmp_path / "set", BuildConfig(held_out=0))
    (tmp_path / "source" / "p009.png").write_bytes(encode(999))
    dataset = Dataset.open(str(tmp_path / "set"))
    found = pictures(dataset, Folder.at(tmp_path / "set"), counted(tmp_path / "set"))
    shown = {one.name: one for one in found.dropped["too_small"]}
    assert (shown["p009.png"].webp, shown["p009.png"].why) == (None, "changed since")
    assert shown["p019.png"].webp


def test_the_command_prints_what_the_page_shows(reported: Path, tmp_path: Path) -> None:
    place = tmp_path / "page.html"
    result = runner.invoke(app, ["report", str(reported), "--out", str(place), "--field", "breed", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["page"], told["inputs"], told["hash"]) == (str(place), 120, read_manifest(reported).hash)
    assert [audit["field"] for audit in told["audits"]] == ["breed"]
    text = place.read_text(encoding="utf-8")
    assert told["hash"] in text
    assert text == page(
        counted(reported, "breed"), pictures(Dataset.open(str(reported)), Folder.at(reported), counted(reported))
    )
    plain = runner.invoke(app, ["report", str(reported), "--out", str(place)])
    assert "120 inputs" in plain.output
    assert "Audited: breed" in plain.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["DATA", "--field", "colour"], "No input has this field"),
        (["memory://nowhere/set"], "The page has no place"),
    ],
)
def test_what_cannot_be_done_is_a_usage_error(words: list[str], message: str, reported: Path) -> None:
    result = runner.invoke(app, ["report", *(str(reported) if word == "DATA" else word for word in words)])
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)


QUANTITIES = (
    Quantity("side", "Side", "pixels", "log", exact=True),
    Quantity("ratio", "Ratio", "", "log"),
    Quantity("words", "Words", "words", "linear"),
    Quantity("score", "Score", "", "linear", 0.001),
)


@settings(deadline=None)
@given(
    quantity=st.sampled_from(QUANTITIES),
    values=st.lists(st.one_of(st.integers(0, 70_000), st.just(math.nan)), min_size=1, max_size=60),
    data=st.data(),
)
def test_a_histogram_loses_nothing_and_its_bins_join(
    quantity: Quantity, values: list[float], data: st.DataObject
) -> None:
    kept = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    counts = Counts(quantity)
    numbers_ = np.array(values, float) / (1000 if quantity.grid < 1 else 1)
    for start in range(0, len(values), 7):
        counts.add(numbers_[start : start + 7], np.array(kept[start : start + 7]))
    histogram = counts.histogram(None)
    known = [not math.isnan(value) and (quantity.scale == "linear" or value > 0) for value in values]
    assert histogram.unknown == known.count(False)
    assert sum(one.kept for one in histogram.bins) == sum(k and one for k, one in zip(known, kept, strict=True))
    assert sum(one.dropped for one in histogram.bins) == sum(k and not one for k, one in zip(known, kept, strict=True))
    assert len(histogram.bins) <= 40
    for before, after in zip(histogram.bins, histogram.bins[1:], strict=False):
        assert before.high == after.low
    for value, one in zip(numbers_, known, strict=True):
        if one:
            slack = 0.012 * value + quantity.grid / 2
            assert any(
                bin_.low - slack <= value <= bin_.high + slack for bin_ in histogram.bins if bin_.kept or bin_.dropped
            )


def test_a_data_set_behind_a_network_is_reported_alike(reported: Path, tmp_path: Path) -> None:
    remote = Folder.at("memory://report/set")
    for path in reported.iterdir():
        remote.upload(path, path.name)
    here, there = tmp_path / "here.html", tmp_path / "there.html"
    assert runner.invoke(app, ["report", str(reported), "--out", str(here)]).exit_code == 0
    result = runner.invoke(app, ["report", remote.place, "--out", str(there)])
    assert result.exit_code == 0, result.output
    assert there.read_text(encoding="utf-8") == here.read_text(encoding="utf-8").replace(
        str(reported), remote.place
    ).replace(f">{reported.name}<", ">set<").replace(f"<title>{reported.name}:", "<title>set:")
    shown = runner.invoke(app, ["show", remote.place, "--sheet", str(tmp_path / "sheet.png"), "--verify"])
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "sheet.png").is_file()
    assert "Contact sheet" not in runner.invoke(app, ["show", remote.place]).output


def test_what_was_forgotten_or_opted_out_is_not_shown_again_nor_are_its_copies(reported: Path, tmp_path: Path) -> None:
    shutil.copytree(reported, tmp_path / "set")
    rules = {13: "forgotten", 19: "opt_out_creator", 29: "unsafe"}
    rows = [
        replace(row, kept=False, rule=rules[row.number]) if row.number in rules else row
        for row in read_ledger(reported)
    ]
    with LedgerWriter(tmp_path / "set" / "ledger.parquet") as writer:
        writer.add(rows)
    found = pictures(
        Dataset(Folder.at(tmp_path / "set"), read_manifest(reported)),
        Folder.at(tmp_path / "set"),
        counted(tmp_path / "set"),
    )
    assert {rule: [(one.webp, one.why) for one in found.dropped[rule]] for rule in rules.values()} == {
        "forgotten": [(None, "forgotten")],
        "opt_out_creator": [(None, "opted out")],
        "unsafe": [(None, "unsafe")],
    }
    copy = next(pair for pair in found.pairs if pair.copy.name == "p014.png")
    assert (copy.kept.webp, copy.copy.webp, copy.copy.why) == (None, None, "forgotten")
    assert all(pair.copy.webp for pair in found.pairs if pair is not copy)
    assert all(one.webp for one in found.dropped["too_small"])


def test_a_page_that_cannot_be_written_says_why(reported: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path, tmp_path / "file" / "page.html"):
        result = runner.invoke(app, ["report", str(reported), "--out", str(place)])
        assert isinstance(result.exception, DataError)
        assert "The report cannot be written" in str(result.exception)
        assert str(place) in str(result.exception)
