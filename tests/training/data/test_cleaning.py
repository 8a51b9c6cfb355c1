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

from tests.training.data.ledgers import read_ledger
from training.data.build import build
from training.data.captions import canonical, parse_object, with_caption
from training.data.clean import CleanConfig, Judgement, Tools, judge
from training.data.clean.decoding import DecodingConfig
from training.data.clean.size import SizeConfig, extreme_aspect, too_many_bytes, too_many_pixels, too_small
from training.data.config import BuildConfig
from training.data.decode import decode
from training.data.findings import Finding
from training.data.ledger import LedgerRow
from training.data.licences import SHOWN, Licences
from training.data.rows import rows
from training.errors import DataError

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
    limits = CleanConfig(size=SizeConfig(max_pixels=50_000, max_bytes=60_000))
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
        "inside.png": "exact_duplicate",
        "outside.png": "outside_source",
        "dangling.png": "missing_file",
        "loop.png": "unreadable",
        "linked": "not_a_file",
        "pipe.png": "not_a_file",
        "bytes-?.png": None,
        "bell\N{REPLACEMENT CHARACTER}.png": None,
    }


def test_a_loop_of_links_gives_equal_ledgers_wherever_the_source_lies(encode: Encode, tmp_path: Path) -> None:
    ledgers = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "good.png").write_bytes(encode(1))
        (tmp_path / name / "loop.png").symlink_to("loop.png")
        (tmp_path / name / "in a file").symlink_to("good.png/nothing")
        build(tmp_path / name, tmp_path / f"{name}.out", BuildConfig(held_out=0))
        ledgers.append((tmp_path / f"{name}.out" / "ledger.parquet").read_bytes())
    assert ledgers[0] == ledgers[1]
    assert b"loop of links" in ledgers[0]


def test_a_folder_that_cannot_be_read_is_one_refusal(
    encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    (source / "lost+found").mkdir(parents=True)
    (source / "good.png").write_bytes(encode(1))
    real = os.scandir

    def forbidden(path: str | int) -> object:  # tests may run as root, whom no mode keeps out
        if isinstance(path, str) and Path(path).name == closed:
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    closed = "lost+found"
    assert {name: row.rule for name, row in _build(source).items()} == {"good.png": None, "lost+found": "unreadable"}
    closed = "source"
    with pytest.raises(DataError, match="folder cannot be read"):
        _build(source)


def test_what_was_dropped_does_not_change_the_data_sets_name(encode: Encode, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(9):
        (source / f"b{number}.png").write_bytes(encode(number))
    first = build(source, tmp_path / "first", BuildConfig(held_out=0.3))
    (source / "a.txt").write_text("a caption of nothing")
    (source / "b3.x.png").write_bytes(b"no picture")
    second = build(source, tmp_path / "second", BuildConfig(held_out=0.3))
    assert (second.hash, second.inputs) == (first.hash, 11)
    keys = [row.key for row in read_ledger(tmp_path / "second") if row.kept]
    assert keys == [f"{number:08d}-b{number}" for number in range(9)]


def test_licences_are_counted_in_bounded_memory_and_printable(encode: Encode, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.png").write_bytes(encode(1))
    stated = [f"by author {number}" for number in range(60)] + ["MIT"] * 5 + [None] * 3
    stated += ["\x1b[31m\ud800\x9b", "x" * 10_000]
    lines = [{"file": "a.png", "licence": name, "caption": f"{at}"} for at, name in enumerate(stated)]
    (source / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = build(source / "list.jsonl", tmp_path / "out", BuildConfig(held_out=0))
    assert sum(manifest.licences.values()) == manifest.kept == 70
    assert len(manifest.licences) == SHOWN + 1
    assert (manifest.licences["MIT"], manifest.licences["unstated"], manifest.licences["other"]) == (5, 3, 14)
    assert all(row.licence.isprintable() and len(row.licence) <= 200 for row in read_ledger(tmp_path / "out"))
    many = Licences()
    for number in range(30_000):
        many.add(f"licence {number}")
    many.add("licence 7")
    assert many.most()["licence 7"] == 2
    assert sum(many.most().values()) == 30_001
    assert len(many._counts) <= 10_001


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
        "payload.pkl": "unsafe_member",
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
    found = list(
        rows("x.csv", io.BytesIO(b'file,caption\na.png,"one, two"\na.png,b,c,d\na.png\n,nothing\na.png,"open'))
    )
    assert [(row.path, dict(row.fields or {}).get("caption")) for row in found[:1]] == [("a.png", "one, two")]
    assert [row.finding is None for row in found] == [True, False, True, False, False]


def _picture_files() -> dict[str, bytes]:
    """A small one of every format and kind that is accepted."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    files = {}
    for name, kind, mode, options in (
        ("png", "PNG", "RGB", {}),
        ("palette png", "PNG", "P", {}),
        ("jpeg", "JPEG", "RGB", {}),
        ("progressive jpeg", "JPEG", "RGB", {"progressive": True}),
        ("restarting jpeg", "JPEG", "RGB", {"restart_marker_rows": 1, "subsampling": 0}),
        ("rgb jpeg", "JPEG", "RGB", {"keep_rgb": True}),
        ("grey jpeg", "JPEG", "L", {}),
        ("cmyk jpeg", "JPEG", "CMYK", {}),
        ("webp", "WEBP", "RGB", {}),
        ("lossless webp", "WEBP", "RGBA", {"lossless": True}),
        ("gif", "GIF", "P", {}),
        ("bmp", "BMP", "RGB", {}),
        ("mpo", "MPO", "RGB", {"save_all": True, "append_images": [picture]}),
    ):
        buffer = io.BytesIO()
        picture.convert(mode).save(buffer, kind, **options)
        files[name] = buffer.getvalue()
    at = files["cmyk jpeg"].index(b"Adobe") + 11  # the same coefficients, said to be YCCK
    files["ycck jpeg"] = files["cmyk jpeg"][:at] + b"\2" + files["cmyk jpeg"][at + 1 :]
    return files


FILES = _picture_files()
DAMAGE = {"undecodable", "truncated", "corrupt", "damaged_jpeg", "unpacks_too_far", "too_many_scans", "too_many_frames"}
TOOLS = Tools.of(CleanConfig())


def _judge(data: bytes, config: CleanConfig | None = None) -> Judgement:
    return judge(data, {"caption": "noise"}, config or CleanConfig(), TOOLS)


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_picture_is_kept(name: str) -> None:
    ending = name.rpartition(" ")[2].replace("jpeg", "jpg").replace("mpo", "jpg")
    judged = _judge(FILES[name])
    assert judged.finding is None
    assert judged.facts is not None
    assert (judged.facts.kind, judged.facts.width, judged.facts.height) == (ending, 40, 24)


def test_what_is_dropped_after_its_header_was_read_has_its_size(encode: Encode, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    pictures = {"good": encode(1, size=(40, 24)), "small": encode(2, size=(9, 30)), "wide": encode(3, size=(200, 20))}
    pictures |= {"cut": encode(4, size=(50, 30))[:-20], "large": encode(5, size=(90, 80)), "none": b"text"}
    for name, data in pictures.items():
        (tmp_path / "source" / f"{name}.png").write_bytes(data)
    size = SizeConfig(max_pixels=5000)
    build(tmp_path / "source", tmp_path / "out", BuildConfig(held_out=0.0, clean=CleanConfig(size=size)))
    rows = {row.source: (row.rule, row.width, row.height, row.kind) for row in read_ledger(tmp_path / "out")}
    assert rows == {
        "cut.png": ("truncated", 50, 30, "png"),
        "good.png": (None, 40, 24, "png"),
        "large.png": ("too_many_pixels", 90, 80, "png"),
        "none.png": ("undecodable", None, None, ""),
        "small.png": ("too_small", 9, 30, "png"),
        "wide.png": ("extreme_aspect", 200, 20, "png"),
    }


@given(st.sampled_from(sorted(FILES)), st.data())
def test_no_damage_to_a_picture_is_fatal_to_the_judge(name: str, data: st.DataObject) -> None:
    damaged = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        length = data.draw(st.integers(0, 8))
        damaged[at : at + length] = data.draw(st.binary(max_size=8))
    judged = _judge(bytes(damaged))
    if judged.finding is None:
        assert judged.facts is not None
        assert judged.facts.kind in {"png", "jpg", "webp", "gif", "bmp"}
        picture = decode(bytes(damaged), (255, 255, 255))
        assert picture.mode == "RGB"
        assert picture.size == (judged.facts.width, judged.facts.height)
    else:
        assert judged.finding.rule in {*DAMAGE, "too_small", "too_many_pixels", "extreme_aspect", "uniform", "blurred"}


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("jpeg")])
def test_a_jpeg_that_pillow_would_fill_with_grey_is_dropped(name: str) -> None:
    whole = FILES[name]
    half = len(whole) // 2
    cut = whole[:half] + b"\xff\xd9"
    finding = _judge(cut).finding
    assert finding is not None
    assert finding.rule == ("truncated" if name == "progressive jpeg" else "damaged_jpeg")
    zeroed = _judge(whole[:half] + bytes(200) + whole[half + 200 :]).finding
    assert zeroed is not None
    assert zeroed.rule in DAMAGE


def test_what_libjpeg_only_warns_of_can_be_kept() -> None:
    whole = FILES["jpeg"]
    cut = whole[: len(whole) // 2] + b"\xff\xd9"
    strict = _judge(cut).finding
    assert strict is not None
    assert "without strict_jpeg" in strict.detail
    lenient = _judge(cut, CleanConfig(decoding=DecodingConfig(strict_jpeg=False)))
    assert lenient.finding is None
    assert lenient.facts is not None
    assert not lenient.facts.direct  # the fast decoder would refuse it


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
    config = SizeConfig(min_side_px=16, max_pixels=256, max_bytes=100, max_aspect=2)
    assert too_small(16, 16, config) is None
    assert too_many_pixels(16, 16, config) is None
    assert too_many_bytes(100, config) is None
    assert too_small(15, 90, config) is not None
    assert too_many_pixels(257, 1, config) is not None
    assert too_many_bytes(101, config) is not None
    assert extreme_aspect(16, 32, config) is None
    assert extreme_aspect(33, 16, config) == Finding("extreme_aspect", 2.0625, 2.0, "33x16: 2.1 to 1")
