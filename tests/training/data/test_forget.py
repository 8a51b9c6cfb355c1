"""Samples are taken out of a finished data set, and stay out; a kill leaves the old data set or the new one."""

import hashlib
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.commands.data import app
from tests.training.data.ledgers import read_ledger
from training.data.build import build
from training.data.config import BuildConfig
from training.data.dataset import Dataset
from training.data.forget import forget
from training.data.forgotten import OptOut, Selector
from training.data.manifest import check_files, read_manifest
from training.errors import DataError, UsageError

Encode = Callable[..., bytes]
runner = CliRunner()
CONFIG = BuildConfig(held_out=0.3, shard_mb=1)


def _wish(selector: Selector, value: str, when: str = "2026-01-02") -> OptOut:
    return OptOut(selector=selector, value=value, when=when)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, encode: Encode) -> Path:
    """Twenty pictures of noise, about 0.2 MB each: five shards; every fourth is Ann's, two are from example.com."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(20):
        (folder / f"{number:02d}.png").write_bytes(encode(number, size=(256, 256)))
        fields = {
            "caption": f"picture {number}",
            "creator": "Ann  Onymous" if number % 4 == 0 else "Bob",
            "licence": "MIT",
        }
        fields |= {"author": "Carl, ", "artist": ["Dora", "Carl"]} if number == 3 else {}
        fields |= {"url": "https://img.Example.com:443/a.png"} if number in {5, 8} else {}
        (folder / f"{number:02d}.json").write_text(json.dumps(fields))
    (folder / "20.png").write_bytes(b"no picture")
    (folder / "20.json").write_text(json.dumps({"creator": "ann onymous", "caption": "she"}))
    return folder


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set; tests copy it."""
    out = tmp_path_factory.mktemp("made") / "out"
    build(source, out, CONFIG)
    return out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


def _pictures(out: Path) -> dict[str, bytes]:
    """The samples of a data set by key, read through its index, and checked against its ledger."""
    dataset = Dataset.open(out)
    check_files(out, dataset.manifest, checksums=True)
    found = {}
    for name in ("train", "held_out"):
        split = dataset.split(name)
        found |= {split.key(n): split.encoded(n) + split.caption(n).encode() for n in range(len(split))}
    for row in read_ledger(out):
        if row.kept:
            assert row.shard is not None
            assert row.offset is not None
            with (out / row.shard).open("rb") as file:
                file.seek(row.offset)
                picture = file.read(row.bytes)
            assert hashlib.sha256(picture).hexdigest() == row.sha256
            assert found[str(row.key)] == picture + row.caption.encode()
    rows = list(read_ledger(out))
    assert sum(row.kept for row in rows) == len(found) == dataset.manifest.kept
    assert len(rows) == dataset.manifest.inputs == dataset.manifest.kept + sum(dataset.manifest.dropped.values())
    return found


def test_a_creator_is_taken_out_and_only_the_shards_concerned_are_written(out: Path, made: Path) -> None:
    before, first = _pictures(out), read_manifest(out)
    (out / "report.html").touch()
    (out / "contact_sheet.png").touch()
    concerned = {str(row.shard) for row in read_ledger(out) if row.kept and row.creator == "Bob" and row.number == 7}
    (shard,) = concerned
    wish = _wish("hash", next(row.sha256 for row in read_ledger(out) if row.number == 7))
    stamps = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    for stem in (Path(shard).stem, "train-000099"):
        (out / "encoded" / "latents-1").mkdir(parents=True, exist_ok=True)
        (out / "encoded" / "latents-1" / f"{stem}.safetensors").touch()
    done = forget(out, [wish])
    after = _pictures(out)
    assert set(before) - set(after) == {"00000007-07"}
    assert all(before[key] == after[key] for key in after)
    assert done.manifest.hash != first.hash
    assert (done.samples, done.inputs, done.shards) == (1, 1, (shard,))
    others = {name for split in first.splits.values() for name in split.shards} - concerned
    assert all((out / name).stat().st_mtime_ns == stamps[name] for name in others)
    names = {path.name for path in out.iterdir()}
    assert not names & {shard, "ledger.parquet", "report.html", "contact_sheet.png"}
    assert [path.name for path in (out / "encoded" / "latents-1").iterdir()] == ["train-000099.safetensors"]
    row = next(row for row in read_ledger(out) if row.number == 7)
    assert (row.kept, row.rule, row.detail) == (False, "forgotten", f"hash {wish.value}, 2026-01-02")
    assert (row.caption, row.fields, row.shard, row.key) == ("", "{}", None, None)
    assert (row.sha256, row.source) == (wish.value, "07.png")


def test_names_are_compared_as_people_write_them(out: Path) -> None:
    done = forget(out, [_wish("creator", "ann ONYMOUS"), _wish("domain", "example.com")])
    assert done.samples == 6  # 0, 4, 8, 12, 16, and 5 by its domain
    assert done.inputs == 7  # and the undecodable one
    gone = {row.number for row in read_ledger(out) if row.rule == "forgotten"}
    assert gone == {0, 4, 5, 8, 12, 16, 20}
    manifest = read_manifest(out)
    assert manifest.dropped == {"forgotten": 7}
    assert manifest.licences == {"MIT": 14}
    assert len(_pictures(out)) == 14


def test_whoever_is_named_wherever_counts(out: Path) -> None:
    assert [forget(out, [_wish("creator", name)], dry_run=True).samples for name in ("dora", "Carl", "Eve")] == [
        1,
        1,
        0,
    ]


def test_twice_and_again(out: Path) -> None:
    forget(out, [_wish("creator", "Bob")])
    again = forget(out, [_wish("creator", "Bob", "2026-02-02")])
    assert (again.inputs, again.manifest.generation) == (0, 1)
    forget(out, [_wish("domain", "example.com")])
    assert read_manifest(out).generation == 2
    assert {row.number for row in read_ledger(out) if row.kept} == {0, 4, 12, 16}
    _pictures(out)
    assert [wish["when"] for wish in json.loads((out / "forgotten.json").read_text())] == ["2026-01-02", "2026-01-02"]


def test_a_dry_run_changes_nothing(out: Path) -> None:
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    done = forget(out, [_wish("creator", "Bob")], dry_run=True)
    assert done.samples == 15
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_disk_that_refuses_is_a_clear_error_and_the_same_command_goes_on(out: Path) -> None:
    first, (soft, hard) = read_manifest(out), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # as a full disk, no shard can be written
    try:
        with pytest.raises(DataError, match="as it was") as raised:
            forget(out, [_wish("creator", "Bob")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "same command again" in str(raised.value)
    assert read_manifest(out) == first
    _pictures(out)
    assert forget(out, [_wish("creator", "Bob")]).samples == 15


def test_a_data_set_is_not_emptied(out: Path) -> None:
    first = read_manifest(out)
    with pytest.raises(DataError, match="Nothing would be left to train on"):
        forget(out, [_wish("creator", "Bob"), _wish("creator", "Ann Onymous")])
    assert read_manifest(out) == first
    assert not (out / "forgotten.json").exists()  # it would forbid every later build
    _pictures(out)


def test_what_was_forgotten_stays_out_when_the_data_set_is_built_again(source: Path, out: Path) -> None:
    done = forget(out, [_wish("creator", "Ann Onymous")])
    assert build(source, out, CONFIG) == done.manifest  # found as it is
    made = build(source, out, BuildConfig(held_out=0.2, shard_mb=1), force=True)
    assert made.dropped == {"forgotten": 5, "undecodable": 1}
    assert {row.number for row in read_ledger(out) if row.rule == "forgotten"} == {0, 4, 8, 12, 16}
    assert (out / "forgotten.json").is_file()
    assert len(_pictures(out)) == 15
    (out / "manifest.json").write_text("{")
    assert build(source, out, CONFIG, force=True).dropped["forgotten"] == 5  # a broken manifest forgets no wish
    (out / "forgotten.json").write_text("{")
    with pytest.raises(DataError, match="opt-outs cannot be read"):
        build(source, out, BuildConfig(held_out=0.2), force=True)


def test_a_kill_at_any_point_leaves_the_old_data_set_or_the_new_one(out: Path, made: Path, tmp_path: Path) -> None:
    forget(out, [_wish("creator", "Ann Onymous")])
    old = {path.name: path.read_bytes() for path in made.iterdir()}
    new = {path.name: path.read_bytes() for path in out.iterdir()}
    program = (
        "import os, shutil, signal, sys\n"
        "from pathlib import Path\n"
        "from training.data.forget import forget\n"
        "from training.data.forgotten import OptOut\n"
        "made, folder = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "wish = OptOut(selector='creator', value='Ann Onymous', when='2026-01-02')\n"
        "def killed(number):\n"
        "    left = number\n"
        "    def dying(real):\n"
        "        def act(*places, **options):\n"
        "            nonlocal left\n"
        "            left -= 1\n"
        "            if left == 0:\n"
        "                os.kill(os.getpid(), signal.SIGKILL)\n"
        "            return real(*places, **options)\n"
        "        return act\n"
        "    os.replace, os.unlink = dying(os.replace), dying(os.unlink)\n"
        "    forget(folder / str(number), [wish])\n"
        "number, signalled = 0, True\n"
        "while signalled:\n"
        "    number += 1\n"
        "    shutil.copytree(made, folder / str(number))\n"
        "    (folder / str(number) / 'report.html').touch()\n"
        "    (folder / str(number) / 'encoded' / 'latents-1').mkdir(parents=True)\n"
        "    for shard in made.glob('*.tar'):\n"
        "        (folder / str(number) / 'encoded' / 'latents-1' / f'{shard.stem}.safetensors').touch()\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        try:\n"
        "            killed(number)\n"
        "        finally:\n"
        "            os._exit(0)\n"
        "    signalled = os.WIFSIGNALED(os.waitpid(pid, 0)[1])\n"
        "print(number)\n"
    )
    words = [sys.executable, "-c", program, made, tmp_path]
    last = int(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert last > 12
    hashes = set()
    for number in range(1, last + 1):
        folder = tmp_path / str(number)
        manifest = read_manifest(folder)
        check_files(folder, manifest, checksums=True)
        hashes.add(manifest.hash)
        forget(folder, [_wish("creator", "Ann Onymous")])
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == new
        encoded = {path.stem for path in (folder / "encoded" / "latents-1").iterdir()}
        assert encoded <= {Path(name).stem for name in new}  # nothing is left of what was forgotten
    assert len(hashes) == 2
    assert old.keys() != new.keys()


def test_the_command(out: Path) -> None:
    told = runner.invoke(app, ["forget", str(out), "--creator", "Bob", "--dry-run"])
    assert told.exit_code == 0, told.output
    assert "15 sample(s) in" in told.output
    assert "would be taken out" in told.output
    done = json.loads(runner.invoke(app, ["forget", str(out), "--creator", "Bob", "--json"]).stdout)
    assert done["samples"] == 15
    assert done["hash"] == read_manifest(out).hash
    nothing = runner.invoke(app, ["forget", str(out), "--domain", "nowhere.example"])
    assert nothing.exit_code == 0, nothing.output
    assert "Nothing in" in nothing.output
    assert "obeyed when the data set is built again" in nothing.output


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "--creator"),
        (["--hash", "abc"], "64 hexadecimal digits"),
        (["--creator", " "], "would mean all"),
        (["--domain", "not a domain"], "a host's name"),
    ],
)
def test_wishes_that_mean_nothing_are_refused(words: list[str], text: str, out: Path) -> None:
    refused = runner.invoke(app, ["forget", str(out), *words])
    assert isinstance(refused.exception, UsageError)
    assert text in str(refused.exception)
