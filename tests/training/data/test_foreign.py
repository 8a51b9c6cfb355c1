import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from training.data.dataset import Dataset, is_dataset
from training.data.disk_cache import DiskCacheConfig
from training.data.foreign import SKIPPED, open_foreign
from training.data.foreign_index import key_of
from training.data.planning import split_of
from training.data.storage import Folder
from training.data.tar_walk import Member, walk
from training.errors import DataError, UsageError

Encode = Callable[..., bytes]
Entry = tuple[str | tarfile.TarInfo, bytes]


@pytest.fixture
def cache(tmp_path: Path) -> DiskCacheConfig:
    return DiskCacheConfig(folder=str(tmp_path / "cache"), size_mb=100, block_mb=1)


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory, encode: Encode) -> Path:
    """Three shards as WebDataset's own writer makes them; 30 samples with captions of all kinds."""
    import webdataset

    folder = tmp_path_factory.mktemp("foreign")
    for shard in range(3):
        # its own opening of files is refused once webdataset was imported as a secure one
        with (folder / f"s-{shard}.tar").open("wb") as file, webdataset.TarWriter(file) as writer:
            for number in range(10 * shard, 10 * shard + 10):
                kind, ending = [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")][number % 3]
                captions = [
                    {"txt": f" number\n{number}"},
                    {"json": {"caption": f"number {number}", "n": number}},
                    {"json": {"n": number}, "txt": f"number {number}", "cls": str(number)},
                    {},
                ][number % 4]
                picture = encode(number, size=(20 + number, 30), kind=kind)
                writer.write({"__key__": f"folder {shard}/{number:04d}", ending: picture, **captions, "npy": b"\x93"})
    return folder


def contents(dataset: Dataset) -> dict[str, tuple[bytes, dict[str, Any], tuple[int, int]]]:
    found = {}
    for name in ("train", "held_out"):
        split = dataset.split(name)
        for index in range(len(split)):
            record = split.records[index]
            size = int(record["width"]), int(record["height"])
            assert split.encoded_with_caption(index) == (split.encoded(index), split.caption(index))
            assert split.picture(index)[0].size == size
            found[split.key(index)] = (split.encoded(index), split.fields(index), size)
    return found


def test_shards_of_webdataset_are_read_as_they_are(foreign: Path, encode: Encode, cache: DiskCacheConfig) -> None:
    dataset = Dataset.open(foreign, cache)
    assert is_dataset(foreign)
    found = contents(dataset)
    assert list(found) == [f"folder {number // 10}/{number:04d}" for number in range(30)]
    for number, (data, fields, size) in enumerate(found.values()):
        kind = ["PNG", "JPEG", "WEBP"][number % 3]
        assert (data, size) == (encode(number, size=(20 + number, 30), kind=kind), (20 + number, 30))
        assert fields["caption"] == ("" if number % 4 == 3 else f"number {number}")
        assert fields.get("n") == (number if number % 4 in {1, 2} else None)
        assert fields.get("label") == (str(number) if number % 4 == 2 else None)
    manifest = dataset.manifest
    assert (manifest.inputs, manifest.kept, manifest.dropped, manifest.without_caption) == (30, 30, {}, 7)
    assert [bool(record["direct"]) for record in dataset.split("train").records] == [i % 3 == 1 for i in range(30)]
    assert dataset.split("train")[4].metadata["caption"] == "number 4"
    with pytest.raises(UsageError, match="come without checksums"):
        dataset.verify()


def test_the_index_is_made_once_and_anew_when_a_shard_changes(
    foreign: Path, tmp_path: Path, cache: DiskCacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(foreign, copy)
    first = Dataset.open(copy, cache)
    assert first.hash == Dataset.open(foreign, cache).hash, "the same shards elsewhere are the same data set"
    with monkeypatch.context() as patch:
        patch.setattr("training.data.foreign.samples", lambda *_, **__: pytest.fail("walked again"))
        assert Dataset.open(copy, cache).hash == first.hash
    members = {"s-0.tar": 0, "s-1.tar": 0}
    with tarfile.open(copy / "s-1.tar") as archive:
        members["s-1.tar"] = len(archive.getmembers())
    (copy / "s-1.tar").write_bytes((copy / "s-0.tar").read_bytes())
    again = Dataset.open(copy, cache)
    assert again.hash != first.hash
    assert len(again.split("train")) == 30
    (copy / "s-2.tar").unlink()
    assert len(Dataset.open(copy, cache).split("train")) == 20


def test_shards_can_be_named_one_by_one(foreign: Path, cache: DiskCacheConfig, tmp_path: Path) -> None:
    assert len(Dataset.open(foreign / "s-1.tar", cache).split("train")) == 10
    some = open_foreign([foreign / "s-2.tar", str(foreign / "s-0.tar")], cache=cache)
    assert [key[:8] for key in contents(some)] == ["folder 2"] * 10 + ["folder 0"] * 10
    with pytest.raises(DataError, match=r"missing(.|\n)*s-9\.tar"):
        open_foreign([foreign / "s-2.tar", foreign / "s-9.tar"], cache=cache)
    with pytest.raises(DataError, match="no folder in common"):
        open_foreign(["s3://one/a.tar", "s3://another/b.tar"], cache=cache)
    with pytest.raises(DataError, match="There is no data set"):
        Dataset.open(tmp_path / "nothing", cache)
    (tmp_path / "texts").mkdir()
    with tarfile.open(tmp_path / "texts" / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(DataError, match="no samples that can be used"):
        Dataset.open(tmp_path / "texts", cache)


def test_pictures_are_held_out_by_their_own_bytes(foreign: Path, cache: DiskCacheConfig) -> None:
    import hashlib

    dataset = open_foreign(foreign, held_out=0.4, cache=cache)
    found = {name: dataset.split(name) for name in ("train", "held_out")}
    assert len(found["train"]) + len(found["held_out"]) == 30
    for name, split in found.items():
        assert len(split)
        for index in range(len(split)):
            digest = hashlib.sha256(split.encoded(index)).digest()
            assert split_of(digest, 0.4) == name
            assert int(split.records[index]["sha256_prefix"]) == int.from_bytes(digest[:8], "big")
    assert set(contents(dataset)) == set(contents(open_foreign(foreign, cache=cache)))


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_names_of_any_length_are_keys(kind: int, tmp_path: Path, encode: Encode, cache: DiskCacheConfig) -> None:
    keys = ["short", "d/" * 40 + "x" * 90, "\N{SNOWMAN}" * 20 + "/k"]
    keys += [] if kind == tarfile.USTAR_FORMAT else ["y" * 240 + "/" + "z" * 200]
    with tarfile.open(tmp_path / "a.tar", "w", format=kind) as archive:
        for number, key in enumerate(keys):
            for ending, data in (("jpg", encode(number, kind="JPEG")), ("txt", key[-20:].encode())):
                header = tarfile.TarInfo(f"{key}.{ending}")
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))
    found = contents(Dataset.open(tmp_path / "a.tar", cache))
    assert list(found) == keys
    assert [fields["caption"] for _, fields, _ in found.values()] == [key[-20:] for key in keys]


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os._exit, (77,))


def test_hostile_members_are_named_and_never_used(
    tmp_path: Path, encode: Encode, cache: DiskCacheConfig, write_tar: Callable[..., Path]
) -> None:
    def special(name: str, kind: bytes) -> tarfile.TarInfo:
        header = tarfile.TarInfo(name)
        header.type, header.linkname = kind, "/etc/passwd"
        return header

    bomb = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(bomb, "PNG")
    (tmp_path / "in").mkdir()
    write_tar(
        tmp_path / "in" / "a.tar",
        [
            ("../../up.jpg", encode(0, kind="JPEG")),
            ("/abs.jpg", encode(0, kind="JPEG")),
            ("good.png", encode(1)),
            ("good.pkl", pickle.dumps(Bomb())),
            ("good.txt", b"fine"),
            (special("link.jpg", tarfile.SYMTYPE), b""),
            (special("pipe.jpg", tarfile.FIFOTYPE), b""),
            ("broken.jpg", b"\xff\xd8\xff no picture"),
            ("bomb.png", bomb.getvalue()),
            ("long.png", encode(2)),
            ("long.json", b"x" * 1_000_001),
            ("last.png", encode(3)),
            ("last.json", b"{not json"),
        ],
    )
    data = (tmp_path / "in" / "a.tar").read_bytes()
    (tmp_path / "in" / "b.tar").write_bytes(data[: data.index(b"broken.jpg") + 515])
    (tmp_path / "in" / "c.tar").write_bytes(b"\x1f\x8b no tar at all" * 100)
    dataset = Dataset.open(tmp_path / "in", cache)
    split = dataset.split("train")
    assert [split.key(index) for index in range(len(split))] == ["good", "long", "last", "good"]
    assert split.fields(0) == {"caption": "fine"}
    assert split.caption(1) == ""
    with pytest.raises(DataError, match=r"train\[2\] of"):
        split.fields(2)
    lines = [json.loads(line) for line in (dataset.home / SKIPPED).read_text().splitlines()]  # type: ignore[attr-defined]
    assert [(line["shard"], line["name"], line["rule"]) for line in lines] == [
        ("a.tar", "../../up.jpg", "unsafe_name"),
        ("a.tar", "/abs.jpg", "unsafe_name"),
        ("a.tar", "good.pkl", "unsafe_member"),
        ("a.tar", "link.jpg", "not_a_file"),
        ("a.tar", "pipe.jpg", "not_a_file"),
        ("a.tar", "broken.jpg", "undecodable"),
        ("a.tar", "bomb.png", "too_many_pixels"),
        ("a.tar", "long.json", "bad_sidecar"),
        ("b.tar", "../../up.jpg", "unsafe_name"),
        ("b.tar", "/abs.jpg", "unsafe_name"),
        ("b.tar", "good.pkl", "unsafe_member"),
        ("b.tar", "link.jpg", "not_a_file"),
        ("b.tar", "pipe.jpg", "not_a_file"),
        ("b.tar", "broken.jpg", "damaged_tar"),
        ("b.tar", "(rest of the tar)", "damaged_tar"),
        ("c.tar", "(rest of the tar)", "damaged_tar"),
    ]
    assert dataset.manifest.inputs == dataset.manifest.kept + sum(dataset.manifest.dropped.values()) == 20
    assert not (tmp_path.parent / "up.jpg").exists()


def test_shards_in_a_bucket_are_the_same(foreign: Path, bucket: str, cache: DiskCacheConfig) -> None:
    for path in foreign.iterdir():
        Folder.at(f"{bucket}/shards").upload(path, path.name)
    remote, local = Dataset.open(f"{bucket}/shards", cache), Dataset.open(foreign, cache)
    assert remote.hash == local.hash
    assert contents(remote) == contents(local)
    assert contents(Dataset.open(f"{bucket}/shards/s-1.tar", cache)) == contents(
        Dataset.open(foreign / "s-1.tar", cache)
    )


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0\\/"), min_size=1, max_size=200).filter(
    lambda name: name.strip(". ") == name
)
KINDS = [tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE]


def packed(members: list[tuple[str, bytes, bytes]], kind: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name, data, type_ in members:
            header = tarfile.TarInfo(name)
            header.type, header.linkname = type_, name[::-1]
            header.size = len(data) if type_ in {tarfile.REGTYPE, tarfile.AREGTYPE} else 0
            archive.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def walked(tar: bytes) -> list[Member]:
    return list(walk(lambda start, size: tar[start : start + size], len(tar)))


MEMBERS = st.lists(st.tuples(NAMES, st.binary(max_size=1500), st.sampled_from(KINDS)), max_size=6)


@given(members=MEMBERS, kind=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_the_walk_finds_what_tarfile_finds(members: list[tuple[str, bytes, bytes]], kind: int) -> None:
    tar = packed(members, kind)
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        theirs = [member for member in archive if not member.isdir()]
    ours = walked(tar)
    assert [(each.start, each.size) for each in ours] == [(each.offset_data, each.size) for each in theirs]
    assert [each.header for each in ours] == [each.offset for each in theirs]
    assert [each.finding is not None and each.finding.rule == "not_a_file" for each in ours] == [
        not each.isreg() for each in theirs
    ]


@given(
    members=MEMBERS,
    kind=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    damage=st.lists(st.tuples(st.integers(0, 20_000), st.binary(min_size=1, max_size=12)), max_size=4),
    end=st.integers(0, 20_000),
)
@example(members=[("a", b"x", tarfile.REGTYPE)], kind=tarfile.GNU_FORMAT, damage=[(124, b"\xff" * 12)], end=20_000)
@example(
    members=[("a", b"x", tarfile.REGTYPE)], kind=tarfile.GNU_FORMAT, damage=[(124, b"\x80" + b"\xff" * 11)], end=20_000
)
def test_a_damaged_tar_never_leads_outside(
    members: list[tuple[str, bytes, bytes]], kind: int, damage: list[tuple[int, bytes]], end: int
) -> None:
    tar = bytearray(packed(members, kind))
    for at, data in damage:
        tar[at : at + len(data)] = data[: max(0, len(tar) - at)]
    found = walked(bytes(tar[:end]))
    for member in found:
        assert 0 <= member.header <= member.start
        assert member.start + member.size <= max(len(tar[:end]), member.start)
        assert member.finding is not None or not member.name.startswith(("/", "../"))
    assert [member.start for member in found] == sorted(member.start for member in found)


def test_a_header_may_lie_with_its_checksum_right() -> None:
    header = tarfile.TarInfo("liar.jpg")
    header.size = 10**12
    found = walked(header.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    assert [(member.name, member.size) for member in found] == [("liar.jpg", 0), ("(rest of the tar)", 0)]
    assert all("says 1000000000000 bytes, and the tar ends before" in str(member.finding) for member in found)


def test_keys_are_webdatasets() -> None:
    from webdataset.tariterators import base_plus_ext

    for name in ("a.jpg", "a.b.jpg", "d.d/a.seg.png", "d/e/f.tar.gz", "noending"):
        assert key_of(name) == (base_plus_ext(name)[0] or name)
