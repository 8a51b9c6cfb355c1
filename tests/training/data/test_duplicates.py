"""Copies are found among many, and pictures that only resemble each other stay."""

import hashlib
import io
import tarfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.training.data.scenes import encoded, scene
from training.data.clean import CleanConfig, Tools, decide, judge
from training.data.clean import duplicates as duplicates_module
from training.data.clean.duplicates import DuplicatesConfig, near_copies
from training.data.clean.hash_index import HashIndex, masks
from training.data.findings import Finding

CONFIG = CleanConfig()
TOOLS = Tools.of(CONFIG)
EMOJI = Path(__file__).parents[3].parent / "shared" / "data" / "emoji" / "images"
SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("source", pa.string()),
        ("sha256", pa.binary(32)),
        ("caption", pa.string()),
        ("phash", pa.uint64()),
        ("thumbnail", pa.binary()),
        ("features", pa.list_(pa.float16())),
    ]
)

Row = dict[str, object]


def row(number: int, data: bytes, source: str = "", caption: str = "") -> Row:
    judged = judge(data, {"caption": caption}, CONFIG, TOOLS)
    assert judged.finding is None
    return {
        "number": number,
        "source": source or f"{number}.png",
        "sha256": hashlib.sha256(data).digest(),
        "caption": caption,
        "phash": judged.measures.phash,
        "thumbnail": judged.measures.thumbnail,
        "features": None,
    }


def decided(rows: list[Row], config: CleanConfig = CONFIG) -> dict[int, Finding]:
    return decide(pa.Table.from_pylist(rows, SCHEMA), config)


def rules(rows: list[Row], config: CleanConfig = CONFIG) -> dict[int, tuple[str, int | None]]:
    return {number: (finding.rule, finding.of) for number, finding in decided(rows, config).items()}


def test_the_same_bytes_again_are_a_copy_of_the_earliest() -> None:
    one, other = encoded(scene(64, 64, 1)), encoded(scene(64, 64, 2))
    rows = [row(7, one), row(3, one), row(5, other), row(9, one)]
    assert rules(rows) == {7: ("exact_duplicate", 3), 9: ("exact_duplicate", 3)}
    off = CONFIG.model_copy(update={"duplicates": DuplicatesConfig(exact=False)})
    assert rules(rows, off) == {}


def test_a_file_with_several_captions_is_one_picture() -> None:
    data, copy = encoded(scene(64, 64)), encoded(scene(64, 64), "JPEG", quality=98)
    rows = [row(number, data, "a.png", f"caption {number % 4}") for number in range(5)]
    rows += [row(5, data, "b.png", "caption 9"), row(6, copy, "c.jpg", "one"), row(7, copy, "c.jpg", "two")]
    assert rules(rows) == {
        4: ("exact_duplicate", 0),  # told already
        5: ("exact_duplicate", 0),  # another file
        6: ("near_duplicate", 0),
        7: ("near_duplicate", 0),  # with all its captions
    }


def test_a_picture_saved_again_is_found_and_another_is_not() -> None:
    picture, smaller = scene(500, 400), scene(500, 400).resize((317, 254), Image.Resampling.LANCZOS)
    again = [
        encoded(picture, "JPEG", quality=60),
        encoded(picture, "WEBP", quality=70),
        encoded(smaller),
        encoded(smaller, "JPEG", quality=80),
        encoded(picture.resize((900, 720), Image.Resampling.BICUBIC), "JPEG", quality=90),
    ]
    changed = picture.copy()
    changed.paste(picture.crop((0, 0, 60, 60)), (300, 200))
    different = [
        encoded(changed),
        encoded(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        encoded(Image.merge("RGB", picture.split()[::-1])),  # the same shapes in other colours
        encoded(scene(500, 400, 5)),
    ]
    rows = [row(number, data) for number, data in enumerate([encoded(picture), *again, *different])]
    found = decided(rows)
    assert list(found) == [1, 2, 3, 4, 5]
    assert {(finding.rule, finding.of) for finding in found.values()} == {("near_duplicate", 0)}
    assert all(finding.threshold == 5 for finding in found.values())
    assert all(finding.value is not None and 0 <= finding.value <= 5 for finding in found.values())


@pytest.mark.parametrize("block", [1, 2, 3, 1024])
def test_no_chain_of_small_steps_drops_what_is_different(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates_module, "_BLOCK", block)
    thumbnails = np.repeat(np.arange(0, 40, 4, dtype=np.uint8)[:, None], 384, 1)
    copies = near_copies(np.zeros(10, np.uint64), thumbnails, DuplicatesConfig(max_difference=5))
    assert copies.of.tolist() == [-1, 0, -1, 2, -1, 4, -1, 6, -1, 8]
    assert copies.difference.tolist() == [0, 4] * 5


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 8), st.sampled_from([1, 3, 16, 1024]))
def test_the_index_finds_what_comparing_all_with_all_finds(seed: int, radius: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, 6, dtype=np.uint64)[rng.integers(0, 6, 60)]
    for _ in range(7):  # up to seven bits of each change
        hashes ^= np.where(rng.random(60) < 0.5, np.uint64(1) << rng.integers(0, 64, 60, dtype=np.uint64), np.uint64(0))
    thumbnails = rng.integers(0, 9, (60, 384)).astype(np.uint8) * (np.arange(384) < 3)
    kept: list[int] = []
    expected = []
    for at in range(60):
        close = [
            before
            for before in kept
            if (int(hashes[at]) ^ int(hashes[before])).bit_count() <= radius
            and np.abs(thumbnails[at].astype(int) - thumbnails[before]).max() <= 4
        ]
        expected.append(close[0] if close else -1)
        kept += [] if close else [at]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates_module, "_BLOCK", block)
        found = near_copies(hashes, thumbnails, DuplicatesConfig(max_distance_bits=radius, max_difference=4))
    assert found.of.tolist() == expected


@pytest.mark.parametrize("radius", range(9))
@pytest.mark.parametrize("count", [1, 10_000, 10**9])
def test_any_few_bits_leave_some_table_untouched(radius: int, count: int) -> None:
    tables = masks(radius, count)
    assert len(tables) <= 40
    rng = np.random.default_rng(0)
    for _ in range(300):
        changed = sum(1 << int(bit) for bit in rng.choice(64, radius, replace=False))
        assert any(not changed & mask for mask in tables)


def test_a_look_up_compares_with_few_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 200_000, dtype=np.uint64)
    index = HashIndex(3, len(hashes))
    for start in range(0, len(hashes), 10_000):
        index.add(hashes[start : start + 10_000], np.arange(start, start + 10_000))
    wanted = hashes[:100] ^ np.uint64(0b1001 << 30)
    looked_at = 0
    real = np.bitwise_count

    def counted(values: np.ndarray) -> np.ndarray:
        nonlocal looked_at
        looked_at += len(values)
        return real(values)

    monkeypatch.setattr(np, "bitwise_count", counted)
    found = {
        (int(query), int(at)) for queries, ids in index.near(wanted) for query, at in zip(queries, ids, strict=True)
    }
    assert found == {(number, number) for number in range(100)}
    assert looked_at < 100 * 200  # of 200,000 each
    assert all(len(table._runs) <= 10 for table in index._tables)


def test_many_copies_of_one_picture_cost_no_square() -> None:
    count = 100_000
    hashes, thumbnails = np.full(count, 5, np.uint64), np.zeros((count, 384), np.uint8)
    assert near_copies(hashes, thumbnails, DuplicatesConfig()).of.tolist() == [-1] + [0] * (count - 1)


def test_decisions_do_not_depend_on_the_order_of_rows() -> None:
    pictures = [encoded(scene(90, 90, seed), kind) for seed in range(6) for kind in ("PNG", "WEBP")]
    rows = [row(number, data) for number, data in enumerate(pictures * 2)]
    expected = decided(rows)
    assert len(expected) >= 12
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(rows))
        assert list(decided([rows[at] for at in order]).items()) == list(expected.items())


def test_rows_without_a_hash_and_no_rows_at_all_are_fine() -> None:
    blank = {**row(0, encoded(scene(64, 64))), "phash": None, "thumbnail": None}
    assert rules([blank, {**blank, "number": 1, "sha256": bytes(32)}]) == {}
    assert rules([]) == {}


def test_the_demos_faces_all_stay() -> None:
    with tarfile.open(fileobj=io.BytesIO(files("training.data.demo").joinpath("smileys.tar").read_bytes())) as archive:
        pictures = [archive.extractfile(member) for member in archive if not member.name.endswith((".jsonl", ".json"))]
        rows = [row(number, file.read()) for number, file in enumerate(pictures) if file]
    assert len(rows) > 100
    assert rules(rows) == {}


@pytest.mark.skipif(not EMOJI.is_dir(), reason="the emoji lie beside the repository")
def test_emoji_that_differ_by_an_eyebrow_stay() -> None:
    paths = sorted(EMOJI.glob("3d-1f46*")) + sorted(EMOJI.glob("*-1f60*")) + sorted(EMOJI.glob("*-1f4[68]*"))
    rows = [row(number, path.read_bytes(), path.name, path.name) for number, path in enumerate(paths)]
    assert len(rows) > 100
    assert {rule for rule, _ in rules(rows).values()} <= {"exact_duplicate"}
