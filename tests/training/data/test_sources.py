"""Every kind of source gives its inputs in a fixed order, by name, with what is known about them."""

import contextlib
import io
import json
import os
import pickle
import sqlite3
import tarfile
import tempfile
import tracemalloc
import uuid
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.commands.data.report import report
from tests.training.data.servers import strangers
from training.data.build import build
from training.data.captions import Fields
from training.data.clean import CleanConfig
from training.data.clean.consent import ConsentConfig
from training.data.config import BuildConfig
from training.data.download_config import DownloadConfig
from training.data.entries import Entry, Listing
from training.data.findings import RefusedError
from training.data.parquet_rows import PictureColumn, open_parquet
from training.data.remote_store import RemoteStore
from training.data.rows import rows
from training.data.sources import Item, Source, SourceConfig, open_source
from training.data.sources.manifests import _local_file
from training.data.sources.tree import add_file
from training.data.storage import Folder
from training.errors import DataError, UsageError

pytestmark = pytest.mark.timeout(60)

Encode = Callable[..., bytes]
WriteTar = Callable[..., Path]


def _read(source: Source) -> dict[str, tuple[bytes, Fields] | str]:
    """Each input's picture and fields, or the rule that refused it; checks what holds for all sources."""
    items = list(source)
    assert list(source) == items, "the same order each time"
    assert all(pickle.loads(pickle.dumps(item)) == item for item in items)  # noqa: S301
    assert max(len(pickle.dumps(item)) for item in items) < 4000
    assert source.count() in {None, len(items)}
    return {item.name: _fetched(item) for item in items}


def _fetched(item: Item) -> tuple[bytes, Fields] | str:
    try:
        return item.fetch(CleanConfig())
    except RefusedError as error:
        return error.finding.rule


def _fields(found: dict[str, tuple[bytes, Fields] | str], *keys: str) -> dict[str, object]:
    """Some fields of each picture, or its rule."""
    return {
        name: value if isinstance(value, str) else tuple(value[1].get(key) for key in keys)
        for name, value in found.items()
    }


def _write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


@pytest.fixture(params=["memory", "s3"])
def remote(request: pytest.FixtureRequest) -> str:
    """An empty prefix of storage that is not this machine's file system."""
    return str(request.getfixturevalue("bucket")) if request.param == "s3" else f"memory://{uuid.uuid4().hex}/set"


def _put(place: str, folder: Path) -> str:
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        Folder.at(place).upload(path, path.relative_to(folder).as_posix())
    return place


# --- folders ---


def _imagefolder(folder: Path, encode: Encode) -> Path:
    names = ["train/cat/1.png", "train/cat/deep/2.png", "train/dog/3.png", "test/cat/4.png", "test/dog/5.png"]
    return _write(folder, {name: encode(number) for number, name in enumerate(names)})


def test_class_folders_become_labels_and_split_folders_splits(encode: Encode, tmp_path: Path, remote: str) -> None:
    folder = _imagefolder(tmp_path / "pets", encode)
    _write(folder, {"train/dog/3.json": '{"label": "wolf"}', "README.md": "pets"})
    expected = {
        "README.md": (None, None),
        "test/cat/4.png": ("cat", "test"),
        "test/dog/5.png": ("dog", "test"),
        "train/cat/1.png": ("cat", "train"),
        "train/cat/deep/2.png": ("cat", "train"),
        "train/dog/3.png": ("wolf", "train"),
    }
    for place in (folder, _put(remote, folder)):
        found = _fields(_read(open_source(place)), "label", "split")
        assert found == expected
        assert list(found) == sorted(found)
        unlabelled = open_source(place, SourceConfig(folder_labels=False))
        assert set(_fields(_read(unlabelled), "label", "split").values()) == {(None, None), ("wolf", None)}


@pytest.mark.parametrize(
    ("more", "labels"),
    [
        ({}, {("cat",), ("dog",)}),
        ({"metadata.csv": "file_name,caption\ntrain/cat/1.png,a cat\n"}, {(None,)}),
        ({"train/metadata.jsonl": '{"file_name": "cat/1.png"}'}, {(None,), ("cat",), ("dog",)}),
        ({"train/dog/metadata.jsonl": '{"file_name": "3.png"}'}, {(None,), ("cat",), ("dog",)}),
        ({"train/9.png": "a picture beside the classes"}, {(None,), ("cat",), ("dog",)}),
        ({"other/9.png": "a third folder beside the splits"}, {("train",), ("test",), ("other",)}),
    ],
)
def test_folders_are_classes_only_where_nothing_speaks_against_it(
    more: dict[str, bytes | str], labels: set[tuple[str | None]], encode: Encode, tmp_path: Path
) -> None:
    folder = _write(_imagefolder(tmp_path / "pets", encode), more)
    assert set(_fields(_read(open_source(folder)), "label").values()) == labels


@pytest.mark.parametrize("split", ["images", "train"])
def test_a_single_folder_is_no_class(split: str, encode: Encode, tmp_path: Path) -> None:
    folder = _write(tmp_path / "set", {f"{split}/only/1.png": encode(1)})
    assert _fields(_read(open_source(folder)), "label") == {f"{split}/only/1.png": (None,)}


def test_metadata_of_every_kind_in_any_folder(encode: Encode, tmp_path: Path, remote: str) -> None:
    folder = _write(
        tmp_path / "set",
        {
            "a/1.png": encode(1),
            "b/2.png": encode(2),
            "c/3.png": encode(3),
            "c/3.txt": "from the text",
            "a/metadata.csv": "file_name,caption\n1.png,one\n",
            "b/metadata.jsonl": '{"file_name": "2.png", "caption": "two"}\n{"url": "http://example.org/a.png"}\n',
        },
    )
    pq.write_table(pa.table({"file_name": ["3.png", "4.png"], "n": [3, 4]}), folder / "c" / "metadata.parquet")
    expected = {
        "b/metadata.jsonl:2": "bad_row",
        "a/1.png": ("one", None),
        "b/2.png": ("two", None),
        "c/3.png": ("from the text", 3),
        "c/4.png": "missing_file",
    }
    for place in (folder, _put(remote, folder)):
        found = _fields(_read(open_source(place)), "caption", "n")
        assert found == expected
        assert list(found) == list(expected)


def test_a_folder_is_known_again_until_a_file_changes(encode: Encode, tmp_path: Path) -> None:
    folder = _write(tmp_path / "set", {"1.png": encode(1), "sub/2.png": encode(2), "sub/2.txt": "two"})
    prints = [open_source(folder).fingerprint, open_source(folder).fingerprint]
    for name in ("sub/2.txt", "1.png"):
        os.utime(folder / name, ns=(1, 1))
        prints.append(open_source(folder).fingerprint)
    (folder / "1.png").unlink()
    prints.append(open_source(folder).fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


def test_a_source_that_holds_nothing_says_so(tmp_path: Path, remote: str) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", remote, _write(tmp_path / "set", {"empty.jsonl": ""}) / "empty.jsonl"):
        with pytest.raises(DataError, match="holds no pictures"):
            list(open_source(place))
    for missing in (tmp_path / "missing", f"{remote}/missing.tar", tmp_path / "x-{0..1}.tar"):
        with pytest.raises(DataError):
            list(open_source(missing))
    with pytest.raises(UsageError, match="no such storage"):
        open_source("ftp://host/pictures")


# --- Parquet ---


def _hub_table(pictures: list[bytes | None], **columns: list[object]) -> pa.Table:
    """As the Hugging Face Hub stores a data set with pictures."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(pictures)]
    return pa.table({"image": pa.array(cells, kind), **columns})


def test_pictures_inside_a_parquet_file(encode: Encode, tmp_path: Path, remote: str) -> None:
    pictures: list[bytes | None] = [encode(number) for number in range(50)]
    pictures[7] = None
    labels = [float("nan") if number == 3 else number / 2 for number in range(50)]
    table = _hub_table(pictures, text=[f"number {number}" for number in range(50)], label=labels, raw=[b"x"] * 50)
    folder = _write(tmp_path / "set", {"README.md": "a data set", "data/state.json": "{}"})
    pq.write_table(table.slice(0, 30), folder / "data" / "train-00000.parquet", row_group_size=20)
    pq.write_table(table.slice(30), folder / "data" / "train-00001.parquet", row_group_size=100)
    for place in (folder, f"{folder}/data/train-{{00000..00001}}.parquet", _put(remote, folder)):
        found = list(_read(open_source(place)).values())
        assert [value if isinstance(value, str) else value[0] for value in found] == [
            "missing_file" if data is None else data for data in pictures
        ]
        assert found[2] == (pictures[2], {"text": "number 2", "caption": "number 2", "label": 1.0})
        assert found[3] == (pictures[3], {"text": "number 3", "caption": "number 3", "label": None})
    assert "data/train-00000.parquet:8" in _read(open_source(folder))
    assert open_source(folder).fingerprint == open_source(folder).fingerprint


def test_a_column_of_bytes_and_one_of_paths(encode: Encode, tmp_path: Path) -> None:
    folder = _write(tmp_path / "set", {"0.png": encode(0), "1.png": encode(1)})
    pq.write_table(pa.table({"jpg": pa.array([encode(5)], pa.large_binary()), "n": [1]}), folder / "bytes.parquet")
    assert _read(open_source(folder / "bytes.parquet")) == {"bytes.parquet:1": (encode(5), {"n": 1, "caption": ""})}
    pq.write_table(_hub_table([None, None], caption=["zero", "one"]), folder / "paths.parquet")
    found = _read(open_source(folder / "paths.parquet"))
    assert found == {f"{n}.png": (encode(n), {"caption": word}) for n, word in enumerate(["zero", "one"])}


def test_rows_of_a_column_are_had_in_any_order_and_few_are_kept(encode: Encode, tmp_path: Path) -> None:
    pictures: list[bytes | None] = [number.to_bytes(4, "big") * 1000 for number in range(600)]
    pq.write_table(_hub_table(pictures), tmp_path / "set.parquet")
    items = list(open_source(tmp_path / "set.parquet"))
    for number in (0, 599, 300, 310, 299, 1, 1):
        assert items[number].fetch(CleanConfig())[0] == pictures[number]


def test_a_damaged_parquet_file(encode: Encode, tmp_path: Path) -> None:
    path = tmp_path / "set.parquet"
    columns = {
        "file_name": [f"{number}.png" for number in range(20)],
        "caption": ["x" * 1000 + str(n) for n in range(20)],
    }
    pq.write_table(pa.table(columns), path, row_group_size=10, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    at = pq.ParquetFile(path).metadata.row_group(0).column(1).data_page_offset
    data[at : at + 20] = b"\xff" * 20
    path.write_bytes(data)
    found = _read(open_source(path))
    assert [found.pop("set.parquet:1")] == ["bad_row"]
    assert found == {f"{number}.png": "missing_file" for number in range(10, 20)}
    path.write_bytes(data[:-100])
    with pytest.raises(DataError, match="manifest cannot be read"):
        list(open_source(path))


def _small_parquet() -> bytes:
    buffer = io.BytesIO()
    table = _hub_table([bytes([number]) * 300 for number in range(32)], text=["a"] * 32, tags=[["b", "c"]] * 32)
    pq.write_table(table, buffer, row_group_size=16)
    return buffer.getvalue()


PARQUET = _small_parquet()


@given(st.lists(st.tuples(st.integers(0, len(PARQUET) - 1), st.binary(max_size=8)), min_size=1, max_size=4))
def test_no_damage_to_a_parquet_file_is_fatal(edits: list[tuple[int, bytes]]) -> None:
    data = bytearray(PARQUET)
    for at, new in edits:
        data[at : at + len(new)] = new
    try:
        found = list(rows("x.parquet", io.BytesIO(data)))
    except DataError:
        return
    for row in found[::8]:
        if row.cell is not None:
            with contextlib.suppress(OSError):
                column = PictureColumn(open_parquet("x", io.BytesIO(data)), row.cell.group, row.cell.column)
                assert isinstance(column.read(row.cell.row), bytes | None)


# --- tars ---


def _shards(folder: Path, encode: Encode, write_tar: WriteTar) -> Path:
    folder.mkdir(parents=True)
    for shard in range(3):
        members = []
        for number in range(2 * shard, 2 * shard + 2):
            members += [(f"{number:04d}.png", encode(number)), (f"{number:04d}.cls", f"{number}\n".encode())]
            members += [(f"{number:04d}.txt", f"number {number}".encode())]
        write_tar(folder / f"shard-{shard:06d}.tar", members)
    return folder


def test_a_set_of_shards(encode: Encode, write_tar: WriteTar, tmp_path: Path, remote: str) -> None:
    folder = _shards(tmp_path / "set", encode, write_tar)
    _write(folder, {"shard-000000.json": "{}", "_stats.csv": "a,b\n", "LICENSE": "MIT", "shard-000001.idx": "0 1\n"})
    expected = {
        f"shard-{number // 2:06d}.tar/{number:04d}.png": (f"number {number}", str(number)) for number in range(6)
    }
    _put(remote, folder)
    places = [folder, remote, f"{folder}/shard-{{000000..000002}}.tar", f"{remote}/shard-{{000000..000002}}.tar"]
    places.append("::".join(f"{folder}/shard-{number:06d}.tar" for number in range(3)))
    for place in places:
        found = _read(open_source(place))
        assert _fields(found, "caption", "label") == expected
        assert list(found) == list(expected)
    first = open_source(folder)
    os.utime(folder / "shard-000001.tar", ns=(1, 1))
    assert (first.count(), open_source(folder).fingerprint == first.fingerprint) == (None, False)


def test_one_bad_shard_is_one_refusal(encode: Encode, write_tar: WriteTar, tmp_path: Path) -> None:
    folder = _shards(tmp_path / "set", encode, write_tar)
    (folder / "shard-000001.tar").write_bytes(b"no tar at all" * 100)
    (folder / "shard-000003.tar").symlink_to("/etc/hostname")
    found = _fields(_read(open_source(folder)), "caption")
    assert list(found.values()) == [
        *(("number 0",), ("number 1",), "damaged_tar", ("number 4",), ("number 5",), "outside_source")
    ]
    with pytest.raises(DataError, match="cannot be read"):
        open_source(f"{folder}/shard-{{000000..000009}}.tar")


def test_a_data_set_of_ours_is_a_source(built: Path) -> None:
    found = _read(open_source(built))
    assert len(found) == 40
    assert all(isinstance(value, tuple) and value[1]["caption"].startswith("number") for value in found.values())


def test_members_that_others_would_unpickle_are_refused_by_name(
    encode: Encode, write_tar: WriteTar, tmp_path: Path
) -> None:
    bad = ["a.pkl", "b.PTH", "c.pyd", "d.pickle.gz", "e.pt", "sub/f.ckpt"]
    path = write_tar(tmp_path / "a.tar", [("good.png", encode(1)), *((name, b"\x80\x04.") for name in bad)])
    found = _read(open_source(path))
    assert isinstance(found.pop("good.png"), tuple)
    assert found == dict.fromkeys(bad, "unsafe_member")
    folder = _write(tmp_path / "set", {"good.png": encode(1), "model.pth": b"\x80\x04."})
    assert _fields(_read(open_source(folder)), "caption") == {"good.png": ("",), "model.pth": "unsafe_member"}


def test_a_header_that_lies_about_its_size(encode: Encode, write_tar: WriteTar, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("good.png", encode(1)), ("liar.png", encode(2))])
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        member = archive.getmember("liar.png")
    member.size = 2**32
    data[member.offset : member.offset + 512] = member.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(data)
    found = _read(open_source(path))
    assert found.pop("liar.png") == "damaged_tar"
    assert isinstance(found.pop("good.png"), tuple)
    assert set(found) <= {"(rest of the tar)"}


def test_extended_headers_are_believed_no_more_than_others(encode: Encode, tmp_path: Path) -> None:
    path = tmp_path / "pax.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, headers in (
            ("long.png", {"path": "x" * 300 + ".png"}),
            ("up.png", {"path": "../../up.png"}),
            ("root.png", {"path": "/etc/cron.d/x.png"}),
            ("big.png", {"size": str(2**50)}),
        ):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(encode(1)), headers
            archive.addfile(member, io.BytesIO(encode(1)))
    found = _fields(_read(open_source(path)), "caption")
    assert found.pop("x" * 300 + ".png") == ("",)
    assert (found.pop("../../up.png"), found.pop("/etc/cron.d/x.png")) == ("unsafe_name", "unsafe_name")
    assert set(found) <= {"big.png", "(rest of the tar)"}
    assert set(found.values()) <= {"damaged_tar"}
    assert found


def test_a_compressed_tar_is_not_unpacked(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.tar"
    with tarfile.open(bomb, "w:gz", compresslevel=9) as archive:
        member = tarfile.TarInfo("zeros.png")
        member.size = 50_000_000
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    assert bomb.stat().st_size < 100_000
    tracemalloc.start()
    with pytest.raises(DataError, match="gunzip"):
        list(open_source(bomb))
    assert _fields(_read(open_source(tmp_path)), "caption") == {"bomb.tar": "damaged_tar"}
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    packed = bomb.rename(tmp_path / "bomb.tar.gz")
    with pytest.raises(DataError, match="gunzip"):
        list(open_source(packed))


def test_a_remote_tar_is_read_by_ranges(
    encode: Encode, write_tar: WriteTar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [("a.png", encode(1)), ("big.bin", os.urandom(60_000_000)), ("b.png", encode(2))]
    write_tar(tmp_path / "big.tar", members)
    Folder.at("memory://big/set").upload(tmp_path / "big.tar", "big.tar")
    sizes = []
    real = RemoteStore.read_range

    def counted(self: RemoteStore, name: str, start: int, size: int) -> bytes:
        sizes.append(size)
        return real(self, name, start, size)

    monkeypatch.setattr(RemoteStore, "read_range", counted)
    monkeypatch.setattr(RemoteStore, "read", lambda *_: pytest.fail("the whole of it"))
    items = {item.name: item for item in open_source("memory://big/set/big.tar")}
    assert [items[name].fetch(CleanConfig())[0] for name in ("a.png", "b.png")] == [encode(1), encode(2)]
    fsspec.filesystem("memory").store.clear()
    assert sum(sizes) < 30_000_000


def test_a_remote_sample_comes_with_one_request(
    encode: Encode, write_tar: WriteTar, tmp_path: Path, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = _put(remote, _shards(tmp_path / "set", encode, write_tar))
    items = list(open_source(place))
    asked = []
    real = RemoteStore.read_range

    def counted(self: RemoteStore, name: str, start: int, size: int) -> bytes:
        asked.append(name)
        return real(self, name, start, size)

    monkeypatch.setattr(RemoteStore, "read_range", counted)
    for number, item in enumerate(items):
        assert item.fetch(CleanConfig()) == (encode(number), {"caption": f"number {number}", "label": str(number)})
    assert len(asked) == len(items) == 6


# --- manifests and URLs ---


def test_paths_of_a_manifest_lead_nowhere_else(encode: Encode, tmp_path: Path, remote: str) -> None:
    folder = _write(tmp_path / "set", {"in/a.png": encode(1)})
    paths = [
        "in/a.png",
        "./in/a.png",
        "../b.png",
        "/etc/passwd",
        "s3://bucket/a.png",
        "memory://bucket/a.png",
        "gone.png",
    ]
    _write(folder, {"list.jsonl": "".join(json.dumps({"file": path}) + "\n" for path in paths)})
    found = list(open_source(folder / "list.jsonl"))
    assert [item.name for item in found] == ["in/a.png", "in/a.png", *paths[2:]]
    rules = [_fetched(item) for item in found]
    assert rules[:2] == [(encode(1), {"caption": ""})] * 2
    assert rules[2:] == [*["outside_source"] * 4, "missing_file"]
    rules = [_fetched(item) for item in open_source(f"{_put(remote, folder)}/list.jsonl")]
    assert rules[:2] == [(encode(1), {"caption": ""})] * 2
    assert rules[2:] == [*["outside_source"] * 4, "missing_file"]


@given(st.lists(st.sampled_from(["in", "out", "a.png", "link", "loop", "b.png", "..", ".", "", "c\0"]), max_size=5))
def test_the_quick_look_at_a_rows_path_finds_what_the_careful_one_finds(parts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = _write(Path(place).resolve() / "set", {"in/a.png": b"1", "a.png": b"22", "../out/b.png": b"333"})
        (root / "out").symlink_to(root.parent / "out")
        (root / "in" / "link").symlink_to(root / "in")
        (root / "link").symlink_to("a.png")
        (root / "loop").symlink_to("loop")
        relative = str(PurePosixPath("/".join(parts)))
        careful = Listing()
        add_file(careful, root, relative)
        (expected,) = [*careful.entries.values(), *careful.refused.values()]
        folders: dict[str, str | None] = {}
        for _ in range(2):
            found = _local_file(root, relative, folders)
            assert type(found) is type(expected)
            if isinstance(found, Entry) and isinstance(expected, Entry):
                assert found.read() == expected.read()
                assert (found.name, found.size, found.stamp) == (expected.name, expected.size, expected.stamp)
                assert (root / found.file).resolve() == (root / expected.file).resolve()
            else:
                assert found == expected


def test_pictures_may_lie_apart_from_their_manifest(encode: Encode, tmp_path: Path, remote: str) -> None:
    pictures = _write(tmp_path / "pictures", {"a.png": encode(1)})
    _write(tmp_path / "lists", {"list.csv": "path,caption\na.png,one\n../lists/list.csv,two\n"})
    for images in (str(pictures), _put(remote, pictures)):
        source = open_source(tmp_path / "lists" / "list.csv", SourceConfig(images=images))
        assert [_fetched(item) for item in source] == [(encode(1), {"caption": "one"}), "outside_source"]


def test_a_password_in_a_url_gets_into_no_ledger(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("https://name:secret@example.org/a.png\nhttps://example.org/b@c.png\n")
    (tmp_path / "list.jsonl").write_text('{"url": "HTTPS://name:secret@example.org/a.png"}\n')
    found = [*open_source(tmp_path / "list.txt"), *open_source(tmp_path / "list.jsonl")]
    assert [item.name for item in found] == ["list.txt:1", "https://example.org/b@c.png", "list.jsonl:1"]
    assert [_fetched(item) for item in found[::2]] == ["bad_url", "bad_url"]
    assert "secret" not in repr(found)


def test_who_opted_out_is_not_even_asked(encode: Encode, tmp_path: Path) -> None:
    (tmp_path / "domains.txt").write_text("127.0.0.2  # no\n")
    with strangers(encode(1)) as server:
        _write(tmp_path, {"list.jsonl": json.dumps({"url": server.url("/a.png"), "creator": "Ann"})})
        config = SourceConfig(download=DownloadConfig(allow_networks=("127.0.0.2",)))
        (item,) = open_source(tmp_path / "list.jsonl", config)
        for consent, rule in (
            (ConsentConfig(opt_out_domains=(tmp_path / "domains.txt",)), "opt_out_domain"),
            (ConsentConfig(require_licence=True), "no_licence"),
        ):
            with pytest.raises(RefusedError) as refused:
                item.fetch(CleanConfig(consent=consent))
            assert refused.value.finding.rule == rule
        assert not server.asked
        other = f"{server.url('/redirect')}?to={server.url('/a.png').replace('127.0.0.2', 'example.org')}"
        (tmp_path / "domains.txt").write_text("example.org\n")
        _write(tmp_path, {"other.txt": other})
        (redirected,) = open_source(tmp_path / "other.txt", config)
        with pytest.raises(RefusedError, match=r"example\.org opted out"):
            redirected.fetch(CleanConfig(consent=ConsentConfig(opt_out_domains=(tmp_path / "domains.txt",) * 2)))
        assert item.fetch(CleanConfig())[0] == encode(1)


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "parquet"])
def test_a_list_of_urls(kind: str, encode: Encode, tmp_path: Path) -> None:
    with strangers(encode(1)) as server:
        urls = [server.url("/cat.png"), server.url("/noai"), server.url("/html"), "ftp://example.org/a.png"]
        path = tmp_path / f"list.{kind}"
        rows = [{"link": url, "caption": f"number {number}"} for number, url in enumerate(urls)]
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif kind == "csv":
            path.write_text("link,caption\n" + "".join(f"{row['link']},{row['caption']}\n" for row in rows))
        else:
            lines = urls if kind == "txt" else [json.dumps(row) for row in rows]
            path.write_text("\n\n".join(lines))
        download = DownloadConfig(allow_networks=("127.0.0.2",), retry_wait_s=0)
        source = open_source(path, SourceConfig(url_field="link", download=download))
        assert (source.volatile, source.count()) == (True, 4)
        found = _read(source)
        caption = "" if kind == "txt" else "number 0"
        picture = found[urls[0]]
        assert isinstance(picture, tuple)
        assert (picture[0], picture[1]["url"], picture[1]["caption"]) == (encode(1), urls[0], caption)
        assert (found[urls[1]], found[urls[2]]) == ("opted_out_noai", "not_a_picture")
        assert list(found.values())[3] == ("bad_row" if kind == "txt" else "bad_url")


def test_a_path_may_be_a_url_and_a_path_beside_a_url_wins(encode: Encode, tmp_path: Path) -> None:
    _write(tmp_path, {"a.png": encode(1)})
    lines = [{"image": "https://nowhere.invalid/b.png"}, {"file_name": "a.png", "url": "https://example.org/a.png"}]
    _write(tmp_path, {"list.jsonl": "".join(json.dumps(line) + "\n" for line in lines)})
    config = SourceConfig(download=DownloadConfig(retries=0))
    linked, local = open_source(tmp_path / "list.jsonl", config)
    assert linked.name == "https://nowhere.invalid/b.png"
    assert _fetched(linked) == "download_failed"
    assert _fetched(local) == (encode(1), {"url": "https://example.org/a.png", "caption": ""})


def test_no_room_for_the_rows_of_a_manifest_is_a_clear_error(
    encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "".join(json.dumps({"file_name": f"{number}.png", "caption": "x" * 1000}) + "\n" for number in range(300))
    _write(tmp_path, {"a.png": encode(1), "metadata.jsonl": lines})
    real = sqlite3.connect

    def small(*words: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = real(*words, **options)
        connection.execute("PRAGMA max_page_count=20")
        return connection

    monkeypatch.setattr(sqlite3, "connect", small)
    with pytest.raises(DataError, match="disk is full") as raised:
        list(open_source(tmp_path))
    assert "TMPDIR" in str(raised.value.mend)


def test_a_url_far_down_a_list_of_files_is_asked_once_and_never_for_a_report(encode: Encode, tmp_path: Path) -> None:
    _write(tmp_path / "source", {"a.png": encode(1)})
    with strangers(encode(2)) as server:
        lines: list[dict[str, str]] = [{"file_name": "a.png", "caption": f"number {number}"} for number in range(120)]
        lines += [{"url": server.url("/a.png")}, {"url": server.url("/b.png")}]
        _write(tmp_path / "source", {"list.jsonl": "".join(json.dumps(line) + "\n" for line in lines)})
        config = BuildConfig(source=SourceConfig(download=DownloadConfig(allow_networks=("127.0.0.2",))))
        manifest = build(tmp_path / "source" / "list.jsonl", tmp_path / "out", config)
        assert (manifest.kept, manifest.dropped) == (121, {"exact_duplicate": 1})
        report(str(tmp_path / "out"), out=None, field=None, as_json=False)
        assert server.asked == {"/a.png": 1, "/b.png": 1}


def test_a_long_list_is_streamed(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    with path.open("w") as file:
        file.writelines(
            f'{{"url": "https://example.org/{number}.png", "caption": "{"x" * 1000}"}}\n' for number in range(10_000)
        )
    source = open_source(path)
    tracemalloc.start()
    names = sum(1 for item in source if item.name.startswith("https://example.org/"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert names == 10_000
    assert peak < 2_000_000, f"{path.stat().st_size} bytes of list, {peak} bytes of memory"


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_line_without_an_end_is_one_bad_row(kind: str, encode: Encode, tmp_path: Path) -> None:
    _write(tmp_path, {"a.png": encode(1)})
    rows = {"jsonl": '{"file": "a.png"}\n', "csv": "a.png,x\n"}
    long = {"jsonl": '{"file": "' + "x" * 20_000_000 + '"}\n', "csv": "a.png" + ",x" * 10_000_000 + "\n"}
    path = tmp_path / f"list.{kind}"
    path.write_text(("file,caption\n" if kind == "csv" else "") + rows[kind] + long[kind] + rows[kind])
    assert [item.finding.rule if item.finding else item.name for item in open_source(path)] == [
        "a.png",
        "bad_row",
        "a.png",
    ]
