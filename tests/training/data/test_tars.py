"""Tars as people pack them, and as strangers who mean harm do."""

import contextlib
import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.data.ledgers import read_ledger
from training.data.build import build
from training.data.config import BuildConfig
from training.data.dataset import Dataset
from training.data.entries import Listing, entry_at, printable
from training.data.sources.tars import list_tar
from training.errors import DataError

pytestmark = pytest.mark.timeout(60)  # a listing that never ends would fill the memory, too

Encode = Callable[..., bytes]


@pytest.fixture
def folder(encode: Encode, tmp_path: Path) -> Path:
    """Pictures with captions of both kinds, in folders."""
    root = tmp_path / "s"
    (root / "images").mkdir(parents=True)
    for number in range(4):
        (root / "images" / f"{number}.png").write_bytes(encode(number))
    rows = [{"file": f"images/{number}.png", "caption": f"row {number}"} for number in range(2)]
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "images" / "2.txt").write_text("text 2")
    (root / "images" / "metadata.csv").write_text("file_name,caption\n3.png,cell 3\n")
    return root


def _captions(source: Path, out: Path) -> list[str]:
    manifest = build(source, out, BuildConfig(held_out=0))
    assert manifest.dropped == {}
    split = Dataset.open(out).split("train")
    assert manifest.without_caption == 0
    return sorted(split.caption(index) for index in range(len(split)))


@pytest.mark.parametrize("words", [["-C", "s", "."], ["s"], ["-C", "s", "images", "captions.jsonl"]])
@pytest.mark.parametrize("kind", ["gnu", "pax", "ustar"])
def test_a_packed_folder_keeps_its_captions_however_it_is_packed(
    words: list[str], kind: str, folder: Path, tmp_path: Path
) -> None:
    subprocess.run(["tar", f"--format={kind}", "-cf", "packed.tar", *words], cwd=tmp_path, check=True)
    expected = ["cell 3", "row 0", "row 1", "text 2"]
    assert _captions(tmp_path / "packed.tar", tmp_path / "out") == expected
    assert _captions(folder, tmp_path / "out of the folder") == expected


def test_a_name_with_a_dot_before_it_is_the_same_name(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    listing = list_tar(entry_at(write_tar(tmp_path / "a.tar", [("a.png", b"1"), ("./a.png", b"2")])))
    assert list(listing.entries) == ["a.png"]
    assert {name: finding.rule for name, finding in listing.refused.items()} == {"a.png (#2)": "duplicate_name"}


def _header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header with a right checksum and any size, negative ones included."""
    header = tarfile.TarInfo(name)
    header.type = kind
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" + (size & (2**88 - 1)).to_bytes(11, "big") if size < 0 else b"%011o\0" % size
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    return bytes(block)


def _long_names(count: int) -> bytes:
    return (_header("././@LongLink", 5, tarfile.GNUTYPE_LONGNAME) + b"a.png".ljust(512, b"\0")) * count


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (_header("a.png", -512), "a negative number"),
        (_header("a.png", -1024), "a negative number"),
        (
            _header("././@LongLink", 2**33 - 1, tarfile.GNUTYPE_LONGNAME),
            "a long name or extended header of 8589934591 bytes",
        ),
        (_header("././@PaxHeader", -512, tarfile.XHDTYPE), "a negative number"),
    ],
)
def test_a_header_that_would_hang_or_crash_ends_the_listing(bad: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.tar"
    path.write_bytes(_header("good.png", 3) + b"abc".ljust(512, b"\0") + bad + bytes(1024))
    listing = list_tar(entry_at(path))
    assert list(listing.entries) == ["good.png"]
    assert listing.entries["good.png"].read() == b"abc"
    assert {name: finding.rule for name, finding in listing.refused.items()} == {"(rest of the tar)": "damaged_tar"}
    assert why in listing.refused["(rest of the tar)"].detail


def test_a_hostile_first_header_is_no_readable_tar(tmp_path: Path) -> None:
    path = tmp_path / "hostile.tar"
    path.write_bytes(_header("a.png", -512) + bytes(1024))
    with pytest.raises(DataError, match="not a readable tar"):
        list_tar(entry_at(path))


def test_headers_in_a_row_take_no_stack(tmp_path: Path) -> None:
    path = tmp_path / "hostile.tar"
    path.write_bytes(_long_names(5000) + _header("b.png", 3) + b"abc".ljust(512, b"\0") + bytes(1024))
    listing = list_tar(entry_at(path))
    assert {name: entry.read() for name, entry in listing.entries.items()} == {"a.png": b"abc"}


class _CountedDict(dict[str, object]):
    """Counts how often it is asked."""

    asked = 0

    def __contains__(self, key: object) -> bool:
        self.asked += 1
        return super().__contains__(key)


def test_many_members_of_one_name_take_steps_in_proportion() -> None:
    refused = _CountedDict()
    listing = Listing(refused=refused)  # type: ignore[arg-type]
    for _ in range(2000):
        listing.refuse("a.png", "duplicate_name", "again")
    assert list(refused)[:3] == ["a.png", "a.png (#2)", "a.png (#3)"]
    assert len(refused) == 2000
    assert refused.asked <= 2 * 2000


def _plain_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, kind in (("a.png", tarfile.REGTYPE), ("b" * 120, tarfile.REGTYPE), ("link", tarfile.SYMTYPE)):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "a.png"
            header.size = 700 if kind == tarfile.REGTYPE else 0
            archive.addfile(header, io.BytesIO(bytes(header.size)))
    return buffer.getvalue()


PLAIN = _plain_tar()
KINDS = [tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.DIRTYPE, b"?"]
headers = st.integers(0, len(PLAIN) // 512 - 1).map(lambda block: block * 512)


@given(st.lists(st.tuples(headers, st.sampled_from(KINDS), st.integers(-(2**70), 2**33 - 1)), min_size=1, max_size=3))
def test_no_header_is_fatal(edits: list[tuple[int, bytes, int]]) -> None:
    data = bytearray(PLAIN)
    for at, kind, size in edits:
        data[at : at + 512] = _header("x", size, kind)
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        file.write(data)
        file.flush()
        try:
            listing = list_tar(entry_at(file.name))
        except DataError:
            return
    assert all(entry.size >= 0 for entry in listing.entries.values())


names = st.text(st.characters(codec="utf-8", exclude_characters="\0\\"), min_size=1, max_size=130)
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@given(st.lists(st.tuples(names, st.binary(max_size=1100)), min_size=1, max_size=5), st.sampled_from(FORMATS))
def test_a_tar_holds_what_tarfile_finds_in_it(members: list[tuple[str, bytes]], kind: int) -> None:
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        with tarfile.open(fileobj=file, mode="w", format=kind) as archive:
            for name, data in members:
                header = tarfile.TarInfo(name)
                header.size = len(data)
                with contextlib.suppress(ValueError):  # too long a name for ustar
                    archive.addfile(header, io.BytesIO(data))
        file.flush()
        with tarfile.open(file.name) as archive:
            held = [(member.name, archive.extractfile(member)) for member in archive if member.isfile()]
            expected = {name: part.read() for name, part in reversed(held) if part is not None}
        listing = list_tar(entry_at(file.name))
        for name, data in expected.items():
            shown = printable(str(PurePosixPath(name)))
            if shown in listing.refused:
                assert shown.startswith("/") or ".." in shown.split("/") or not shown.strip("./") or "." in shown
            elif shown == name and sum(printable(str(PurePosixPath(other))) == shown for other in expected) == 1:
                assert listing.entries[shown].read() == data
        assert sum(map(len, (listing.entries, listing.refused))) == len(held)


def test_the_ledger_names_what_a_hostile_tar_hid(
    encode: Encode, write_tar: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_tar(tmp_path / "cut.tar", [("good.png", encode(1))])
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"IEND") // 512 * 512 + 512] + _header("bad.png", -512) + bytes(1024))
    build(path, tmp_path / "out", BuildConfig(held_out=0))
    assert {row.source: row.rule for row in read_ledger(tmp_path / "out")} == {
        "good.png": None,
        "(rest of the tar)": "damaged_tar",
    }
