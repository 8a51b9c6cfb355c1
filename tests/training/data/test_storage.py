import asyncio
import errno
import os
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec.asyn
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data import remote_store
from training.data.remote_errors import plain_words
from training.data.storage import Folder, confined, is_remote
from training.errors import StorageError, UsageError

NAMES = ["a b#ü?.txt", "e%20+&=.bin", "sub.b", "sub/x/[y]*.bin", "sub/z", "\N{SNOWMAN}/{1..2}"]
"""In the order of their code points, which is the order of every listing."""


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An empty folder, on each kind of storage that can be had."""
    if request.param == "local":
        return Folder.at(tmp_path / "a folder #1")
    if request.param == "memory":
        return Folder.at(f"memory://{tmp_path.name}/a folder #1")
    return Folder.at(f"{request.getfixturevalue('bucket')}/a folder #1")


def test_what_is_written_is_read(folder: Folder, tmp_path: Path) -> None:
    assert list(folder.names()) == []
    for number, name in enumerate(NAMES):
        folder.write(name, bytes([number]) * (number + 1))
    assert list(folder.names()) == NAMES
    assert [stored.size for stored in folder.files()] == [1, 2, 3, 4, 5, 6]
    assert list(folder.names("sub")) == ["sub.b", "sub/x/[y]*.bin", "sub/z"]
    assert list(folder.names("sub/")) == list(folder.names("sub/"))[:2] == ["sub/x/[y]*.bin", "sub/z"]
    assert list(folder.child("sub").names()) == ["x/[y]*.bin", "z"]
    for number, name in enumerate(NAMES):
        assert folder.read(name) == bytes([number]) * (number + 1)
        assert (folder.size(name), folder.exists(name)) == (number + 1, True)
    assert not folder.exists("sub"), "a folder is no file"
    assert pickle.loads(pickle.dumps(folder)) == folder  # noqa: S301
    folder.download("sub/z", tmp_path / "new" / "z")
    folder.upload(tmp_path / "new" / "z", "z again")
    assert folder.read("z again") == bytes([4]) * 5


def test_ranges_end_with_the_file(folder: Folder) -> None:
    folder.write("digits", b"0123456789")
    ranges = [(0, 10), (3, 4), (8, 100), (10, 1), (500, 5), (4, 0)]
    assert [folder.read_range("digits", *each) for each in ranges] == [b"0123456789", b"3456", b"89", b"", b"", b""]
    with pytest.raises(UsageError, match="must lie in the file"):
        folder.read_range("digits", -1, 4)


def test_writing_anew_changes_the_stamp_and_removing_twice_is_no_error(folder: Folder) -> None:
    folder.write("a", b"one")
    before = folder.stat("a")
    folder.write("a", b"two")
    assert folder.read("a") == b"two"
    assert folder.stat("a").stamp != before.stamp
    folder.remove("a")
    folder.remove("a")
    assert not folder.exists("a")


def test_what_is_missing_is_named(folder: Folder, tmp_path: Path) -> None:
    folder.write("there", b"")
    for attempt in (
        lambda: folder.read("not here"),
        lambda: folder.read_range("not here", 0, 1),
        lambda: folder.size("not here"),
        lambda: folder.download("not here", tmp_path / "x"),
        lambda: folder.read("there/not here"),
    ):
        with pytest.raises(FileNotFoundError, match="not here"):
            attempt()
    assert not (tmp_path / "x").exists()
    assert folder.read("there") == b""


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../up", "a/../../b", "a//b", "./a", "a/", "nul\0", ".."])
def test_names_stay_inside(name: str, tmp_path: Path) -> None:
    for place in (str(tmp_path), "memory://x"):
        for attempt in (
            Folder.at(place).read,
            Folder.at(place).exists,
            Folder.at(place).child,
            Folder.at(place).remove,
        ):
            with pytest.raises(UsageError, match="must stay inside its folder"):
                attempt(name)


@given(st.text(max_size=12))
def test_a_confined_name_lies_below_its_folder(name: str) -> None:
    try:
        confined(name)
    except UsageError:
        return
    assert os.path.normpath(f"/folder/{name}") == f"/folder/{name}"


@pytest.mark.parametrize(
    ("place", "canonical", "remote"),
    [
        ("s3://bucket/a b/#c/", "s3://bucket/a b/#c", True),
        ("s3a://bucket", "s3://bucket", True),
        ("gcs://bucket/x", "gs://bucket/x", True),
        ("hf://datasets/me/set@main/x", "hf://datasets/me/set@main/x", True),
        ("file:///srv/a%20b", "/srv/a b", False),
        ("/srv/a:b", "/srv/a:b", False),
    ],
)
def test_places_have_one_spelling(place: str, canonical: str, remote: bool) -> None:
    folder = Folder.at(place)
    assert (folder.place, folder.local is None, is_remote(place)) == (canonical, remote, remote)
    assert Folder.at(folder.place) == folder


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("ftp://host/x", r"no such storage(.|\n)*'ftp://'(.|\n)*s3://, gs://, hf://"),
        ("s3://", "names no bucket"),
        ("s3://bucket/../other", "must not go up"),
        ("s3://key:secret@bucket/x", "Credentials do not belong"),
    ],
)
def test_places_that_are_none_are_refused(place: str, told: str) -> None:
    with pytest.raises(UsageError, match=told) as refused:
        Folder.at(place)
    assert "secret" not in str(refused.value)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder.at(tmp_path)
    folder.write("a", b"before")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        folder.write("a", b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert folder.read("a") == b"before"


def test_a_file_that_is_being_written_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".123.partial").write_bytes(b"half")
    assert list(Folder.at(tmp_path).names()) == []


def test_bad_keys_are_refused_at_once(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Folder.at(bucket).write("a", b"1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    folder = Folder.at(bucket)
    monkeypatch.setattr(remote_store.time, "sleep", lambda _: pytest.fail("asked again"))
    attempts: list[Callable[[], Any]] = [
        lambda: folder.read("a"),
        lambda: folder.read_range("a", 0, 1),
        lambda: folder.exists("b"),
        lambda: folder.write("b", b""),
        lambda: list(folder.names()),
        lambda: folder.remove("a"),
    ]
    for attempt in attempts:
        with pytest.raises(StorageError, match=r"refuses(.|\n)*AWS_SECRET_ACCESS_KEY") as refused:
            attempt()
        assert "wrong-secret" not in str(refused.value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "reader-secret")
    assert folder.read("a") == b"1"
    with pytest.raises(StorageError, match="Access Denied"):
        folder.write("a", b"2")


def test_a_missing_bucket_is_not_a_missing_file(bucket: str) -> None:
    gone = f"{bucket.split('/')[2]}-gone"
    folder = Folder.at(f"s3://{gone}/x")
    for attempt in (lambda: folder.read("a"), lambda: folder.exists("a"), lambda: list(folder.names())):
        with pytest.raises(StorageError, match=f"there is no {gone}"):
            attempt()


def test_a_forked_child_and_its_parent_both_read(bucket: str) -> None:
    folder = Folder.at(bucket)
    folder.write("a", b"1")
    child = os.fork()
    if not child:
        os._exit(0 if folder.read("a") == b"1" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert folder.read("a") == b"1"


@pytest.mark.parametrize(
    ("place", "settings", "mend"),
    [
        ("s3://bucket/x", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a"}, "AWS_ENDPOINT_URL"),
        ("gs://bucket/x", {"STORAGE_EMULATOR_HOST": "http://127.0.0.1:9"}, "GOOGLE_APPLICATION_CREDENTIALS"),
        ("hf://datasets/me/set", {}, "HF_TOKEN"),
    ],
)
def test_storage_without_an_answer_is_asked_a_few_times(
    place: str, settings: dict[str, str], mend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"AWS_SECRET_ACCESS_KEY": "very-secret", **settings}.items():
        monkeypatch.setenv(name, value)
    pauses: list[float] = []

    wait, wait_in_loop, mine = time.sleep, asyncio.sleep, threading.get_ident()

    def sleep(seconds: float) -> None:
        pauses.append(seconds) if threading.get_ident() == mine else wait(seconds)

    async def pause(seconds: float, *more: Any) -> None:
        if asyncio.get_running_loop() is fsspec.asyn.get_loop():
            pauses.append(seconds)
        else:
            await wait_in_loop(seconds, *more)

    # both are everybody's: other threads of this process go on waiting
    monkeypatch.setattr(remote_store.time, "sleep", sleep)
    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", pause)  # of asyncio itself, which botocore waits with, too
    with pytest.raises(StorageError, match=mend) as silent:
        Folder.at(place).read("a")
    assert place in str(silent.value)
    assert "very-secret" not in str(silent.value)
    assert sum(pauses) < 60


def test_each_protocol_has_its_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # google.auth would look for a machine of Google's
    found = {protocol: remote_store.filesystem(protocol) for protocol in ("s3", "gs", "hf")}
    names = {protocol: f"{type(files).__module__}.{type(files).__name__}" for protocol, files in found.items()}
    assert names == {
        "s3": "s3fs.core.S3FileSystem",
        "gs": "gcsfs.core.GCSFileSystem",
        "hf": "huggingface_hub.hf_file_system.HfFileSystem",
    }
    assert remote_store.filesystem("s3") is found["s3"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert remote_store.filesystem("s3") is not found["s3"], "who asks has changed"


def test_messages_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    told = plain_words(OSError("http://me:pass@host/x?X-Amz-Signature=abc&a=1 said hush-hush\nand more"))
    assert told == "http://***@host/x?X-Amz-Signature=***&a=1 said *** and more"
