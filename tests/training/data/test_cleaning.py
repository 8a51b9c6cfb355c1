"""Every rule drops what it names, and nothing that a stranger's file does is fatal."""

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from training.data.build import build
from training.data.captions import canonical, parse_object, rows, with_caption
from training.data.clean import CleanConfig, judge, too_many_bytes, too_many_pixels, too_small
from training.data.config import BuildConfig
from training.data.decode import decode, square
from training.data.ledger import LedgerRow, read_ledger

Encode = Callable[..., bytes]
WriteTar = Callable[..., Path]


def _bomb() -> bytes:
    """A small PNG whose header promises 30,000 x 30,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def _build(source: Path, config: BuildConfig | None = None) -> dict[str, LedgerRow]:
    out = source.parent / f"{source.name}.out"
    manifest = build(source, out, config or BuildConfig(held_out=0))
    ledger = {row.source: row for row in read_ledger(out)}
    assert len(ledger) == manifest.inputs == manifest.kept + sum(manifest.dropped.values())
    return ledger


def test_every_broken_picture_is_a_line_of_the_ledger(encode: Encode, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    plain = io.BytesIO()
    Image.new("RGB", (300, 200)).save(plain, "PNG")
    png, jpeg, webp = encode(1), encode(2, (64, 64), "JPEG"), encode(3, (64, 64), "WEBP")
    files = {
        "good.png": png,
        "misnamed.txt.png": jpeg,
        "no_ending": webp,
        "empty.png": b"",
        "text.png": b"not a picture at all",
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut.png": png[: len(png) // 2],
        "cut.webp": webp[: len(webp) // 2],
        "cut_in_the_header.png": png[:20],
        "flipped.png": png[:60] + bytes([png[60] ^ 0xFF]) + png[61:],
        "small.png": encode(4, (15, 100)),
        "bomb.png": _bomb(),
        "wide.png": plain.getvalue(),
        "heavy.png": encode(6, (150, 150)),
        "notes.txt": b"a caption of nothing",
        "bad_json.png": png,
        "bad_json.json": b'{"caption": NaN}',
        "list_caption.png": png,
        "list_caption.json": b'{"caption": ["a", "b"]}',
        ".DS_Store": b"hidden files are not inputs",
    }
    for name, data in files.items():
        (source / name).write_bytes(data)
    limits = CleanConfig(max_pixels=50_000, max_bytes=60_000)
    ledger = _build(source, BuildConfig(held_out=0, clean=limits))
    assert {name: row.rule for name, row in ledger.items()} == {
        "good.png": None,
        "misnamed.txt.png": None,
        "no_ending": None,
        "empty.png": "undecodable",
        "text.png": "undecodable",
        "cut.jpg": "truncated",
        "cut.png": "truncated",
        "cut.webp": "undecodable",
        "cut_in_the_header.png": "undecodable",
        "flipped.png": "corrupt",
        "small.png": "too_small",
        "bomb.png": "too_many_pixels",
        "wide.png": "too_many_pixels",
        "heavy.png": "too_many_bytes",
        "notes.txt": "sidecar_without_image",
        "bad_json.png": "bad_sidecar",
        "list_caption.png": "bad_sidecar",
    }
    assert (ledger["small.png"].value, ledger["small.png"].threshold) == (15, 16)
    assert ledger["heavy.png"].sha256 == ""  # too large: never read
    assert ledger["list_caption.png"].detail == "caption must be text, not list"


def test_links_pipes_and_strange_names_in_a_folder(encode: Encode, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(encode(1))
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "good.png").write_bytes(encode(2))
    (source / "inside.png").symlink_to(source / "good.png")
    (source / "outside.png").symlink_to(tmp_path / "secret.png")
    (source / "dangling.png").symlink_to(source / "nowhere.png")
    (source / "loop.png").symlink_to(source / "loop.png")
    (source / "linked").symlink_to(tmp_path)
    os.mkfifo(source / "pipe.png")
    Path(os.fsdecode(os.fsencode(source) + b"/bytes-\xff.png")).write_bytes(encode(3))
    (source / "bell\a.png").write_bytes(encode(4))
    ledger = _build(source)
    assert {name: row.rule for name, row in ledger.items()} == {
        "good.png": None,
        "inside.png": None,
        "outside.png": "outside_source",
        "dangling.png": "missing_file",
        "loop.png": "unreadable",
        "linked": "not_a_file",
        "pipe.png": "not_a_file",
        "bytes-?.png": None,
        "bell\N{REPLACEMENT CHARACTER}.png": None,
    }


def test_every_member_of_a_hostile_tar_is_refused_by_name(encode: Encode, write_tar: WriteTar, tmp_path: Path) -> None:
    def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
        header = tarfile.TarInfo(name)
        header.type, header.linkname = kind, target
        return header

    members: list[tuple[str | tarfile.TarInfo, bytes]] = [
        ("good.png", encode(1)),
        ("good.json", b'{"caption": "fine"}'),
        ("/absolute.png", encode(2)),
        ("../climbs.png", encode(2)),
        ("a/../../climbs.png", encode(2)),
        ("back\\slash.png", encode(2)),
        ("good.png", encode(3)),
        ("payload.pkl", b"\x80\x04cos\nsystem\n(S'true'\ntR."),
        (special("soft.png", tarfile.SYMTYPE, "/etc/passwd"), b""),
        (special("hard.png", tarfile.LNKTYPE, "good.png"), b""),
        (special("device", tarfile.CHRTYPE), b""),
        (special("pipe", tarfile.FIFOTYPE), b""),
        (special("folder", tarfile.DIRTYPE), b""),
    ]
    before = set(tmp_path.parent.iterdir())
    ledger = _build(write_tar(tmp_path / "hostile.tar", members))
    assert {name: row.rule for name, row in ledger.items()} == {
        "good.png": None,
        "/absolute.png": "unsafe_name",
        "../climbs.png": "unsafe_name",
        "a/../../climbs.png": "unsafe_name",
        "back\\slash.png": "unsafe_name",
        "good.png (#2)": "duplicate_name",
        "payload.pkl": "undecodable",
        "soft.png": "not_a_file",
        "hard.png": "not_a_file",
        "device": "not_a_file",
        "pipe": "not_a_file",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"hostile.tar", "hostile.tar.out"}
    assert set(tmp_path.parent.iterdir()) == before


@pytest.mark.parametrize("damage", ["cut in a member", "garbage header", "a size that lies"])
def test_the_good_part_of_a_damaged_tar_is_kept(
    damage: str, encode: Encode, write_tar: WriteTar, tmp_path: Path
) -> None:
    path = write_tar(tmp_path / "damaged.tar", [(f"{n}.png", encode(n)) for n in range(4)])
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        third = archive.getmembers()[2].offset
    if damage == "cut in a member":
        data = data[: third + 700]
    elif damage == "garbage header":
        data[third : third + 512] = b"x" * 512
    else:
        header = tarfile.TarInfo("2.png")
        header.size = 2**40
        data[third : third + 512] = header.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(data)
    rules = {name: row.rule for name, row in _build(path).items()}
    assert (rules.pop("0.png"), rules.pop("1.png")) == (None, None)
    assert rules
    assert set(rules) <= {"2.png", "(rest of the tar)"}
    assert set(rules.values()) <= {"damaged_tar", "too_many_bytes", "unreadable"}


def test_pairs_in_a_tar_follow_webdatasets_naming(encode: Encode, write_tar: WriteTar, tmp_path: Path) -> None:
    members = [
        ("a/1.left.png", encode(1)),
        ("a/1.right.png", encode(2)),
        ("a/1.json", b'{"caption": "both"}'),
        ("b.png", encode(3)),
        ("b.txt", "\ufefflönger\n  text".encode()),
    ]
    path = write_tar(tmp_path / "pairs.tar", members)
    assert {row.rule for row in _build(path).values()} == {None}
    from training.data.dataset import Dataset

    split = Dataset.open(tmp_path / "pairs.tar.out").split("train")
    assert [split.caption(n) for n in range(3)] == ["both", "both", "lönger text"]


def test_a_manifest_reads_only_its_own_folder(encode: Encode, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(encode(1))
    (folder / "good.png").write_bytes(encode(2))
    listed = [
        "good.png",
        "../secret.png",
        str(folder / "good.png"),
        str(tmp_path / "secret.png"),
        "gone.png",
        "a\0.png",
    ]
    lines = [json.dumps({"image": name}) for name in listed] + [
        '{"caption": "no picture"}',
        "{",
        "1" * 5000,
        "[" * 5000,
    ]
    (folder / "list.jsonl").write_text("\n".join(lines))
    rules = [(row.source, row.rule) for row in _build(folder / "list.jsonl").values()]
    assert [rule for _, rule in rules] == [
        None,
        "outside_source",
        "outside_source",
        "outside_source",
        "missing_file",
        "unreadable",
        *["bad_row"] * 4,
    ]
    assert rules[6][0] == "list.jsonl:7"


def test_a_csv_that_breaks_half_way(encode: Encode, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").write_bytes(encode(1))
    found = list(rows("x.csv", b'file,caption\na.png,"one, two"\na.png,b,c,d\na.png\n,nothing\na.png,"open'))
    assert [(row.path, dict(row.fields or {}).get("caption")) for row in found[:1]] == [("a.png", "one, two")]
    assert [row.finding is None for row in found] == [True, False, True, False, False]


@given(st.binary(max_size=300))
def test_no_bytes_are_fatal_to_the_judge(data: bytes) -> None:
    finding, _ = judge(data, CleanConfig())
    assert finding is not None
    assert finding.rule == "undecodable"


values = st.none() | st.booleans() | st.integers() | st.text()


@given(st.recursive(values, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8))
def test_parsed_objects_are_spelled_one_way(value: object) -> None:
    text = json.dumps({"x": value}).encode()
    assert canonical(parse_object(text)) == canonical(parse_object(canonical(parse_object(text))))


@pytest.mark.parametrize("text", [b"[]", b"1", b'{"a": Infinity}', b'{"a": 1e999}', b"\xff", b"", b'{"a": ' * 100_000])
def test_what_is_no_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - whatever the parser says, the ledger repeats
        parse_object(text)


def test_captions_are_one_tidy_line() -> None:
    assert with_caption({"text": " a\n\tcat \ud800"}) == {"text": " a\n\tcat \ud800", "caption": "a cat ?"}
    assert with_caption({"caption": None, "prompt": "b"})["caption"] == "b"
    assert with_caption({})["caption"] == ""


def test_limits_are_inclusive() -> None:
    config = CleanConfig(min_side_px=16, max_pixels=256, max_bytes=100)
    assert too_small(16, 16, config) is None
    assert too_many_pixels(16, 16, config) is None
    assert too_many_bytes(100, config) is None
    assert too_small(15, 90, config) is not None
    assert too_many_pixels(257, 1, config) is not None
    assert too_many_bytes(101, config) is not None


def test_transparency_is_composited_before_resizing() -> None:
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:, 16:] = (0, 0, 255, 255)
    pixels[:, :16, 0] = 255  # red, but invisible
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    small = square(decode(buffer.getvalue(), (0, 255, 0)), 8)
    assert small.shape == (8, 8, 3)
    assert small[..., 0].max() == 0  # no red bleeds in
    assert small[4, 0].tolist() == [0, 255, 0]
    assert small[4, 7].tolist() == [0, 0, 255]


def test_pictures_of_any_mode_become_upright_rgb(encode: Encode) -> None:
    deep = io.BytesIO()
    Image.fromarray(np.full((20, 20), 0x8000, np.uint16)).save(deep, "PNG")
    assert np.unique(decode(deep.getvalue(), (255, 255, 255))).tolist() == [0x80]
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(turned, "JPEG", exif=exif)
    assert decode(turned.getvalue(), (255, 255, 255)).size == (20, 30)
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK"):
        buffer = io.BytesIO()
        Image.new("RGBA", (20, 20), (9, 9, 9, 128)).convert(mode).save(buffer, "JPEG" if mode == "CMYK" else "PNG")
        assert decode(buffer.getvalue(), (255, 255, 255)).mode == "RGB"


def test_the_centre_of_a_picture_that_is_not_square_is_kept() -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    assert np.unique(square(Image.fromarray(pixels), 10)).tolist() == [200]
