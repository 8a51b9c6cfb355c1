"""A data set takes its place by one rename, and what else lies there is never lost."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from training.data.build import build
from training.data.config import BuildConfig
from training.data.manifest import check_files, read_manifest
from training.data.progress import Step
from training.errors import DataError


@pytest.fixture
def out(built: Path, tmp_path: Path) -> Path:
    """A data set of ``pictures`` that may be changed."""
    shutil.copytree(built, tmp_path / "out")
    return tmp_path / "out"


CONFIG = BuildConfig(held_out=0.2)
OTHER = BuildConfig(held_out=0.3)


@pytest.mark.parametrize("name", ["train-000000.tar", "train.index.npy", "ledger.parquet"])
def test_force_repairs_a_flipped_bit(name: str, pictures: Path, out: Path) -> None:
    damaged = bytearray((out / name).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (out / name).write_bytes(damaged)
    with pytest.raises(DataError, match="another sha256") as refused:
        check_files(out, read_manifest(out), checksums=True)
    assert "--force" in str(refused.value)
    check_files(out, build(pictures, out, CONFIG, force=True), checksums=True)


def test_what_was_encoded_outlives_a_build(pictures: Path, out: Path) -> None:
    (out / "encoded" / "latents-1").mkdir(parents=True)
    (out / "encoded" / "latents-1" / "train-000000.safetensors").write_text("hours of work")
    build(pictures, out, OTHER, lambda _: (out / "encoded" / "more").touch(), force=True)
    assert read_manifest(out).config == OTHER
    assert (out / "encoded" / "latents-1" / "train-000000.safetensors").read_text() == "hours of work"


def test_force_leaves_a_sound_result_alone(pictures: Path, out: Path) -> None:
    before = (out / "manifest.json").stat().st_ino
    build(pictures, out, CONFIG, force=True)
    assert (out / "manifest.json").stat().st_ino == before


def test_force_mends_an_edited_and_a_broken_manifest(pictures: Path, out: Path) -> None:
    text = (out / "manifest.json").read_text()
    for wrong in (text.replace('"count": ', '"count": 1'), "{"):
        (out / "manifest.json").write_text(wrong)
        with pytest.raises(DataError, match="manifest") as refused:
            build(pictures, out, CONFIG)
        assert str(refused.value).endswith(f"{out} --force")
        check_files(out, build(pictures, out, CONFIG, force=True), checksums=True)


def test_what_appears_in_the_output_folder_meanwhile_stays(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write(step: Step) -> None:
        if step.stage == "decide":
            out.mkdir()
            (out / "thesis.txt").write_text("years of work")

    with pytest.raises(DataError, match="changed while the data set was built"):
        build(pictures, out, CONFIG, write)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.building"}
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    (out / "thesis.txt").unlink()
    build(pictures, out, CONFIG)  # goes on with what was done
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_added_to_a_data_set_while_it_is_replaced_stays(pictures: Path, out: Path) -> None:
    first = read_manifest(out)

    def write(step: Step) -> None:
        if step.stage == "write":
            (out / "contact_sheet.png").write_text("may come and go")
            (out / "thesis.txt").write_text("years of work")

    with pytest.raises(DataError, match="changed while the data set was built"):
        build(pictures, out, OTHER, write, force=True)
    assert read_manifest(out) == first
    assert (out / "thesis.txt").read_text() == "years of work"
    build(pictures, out, OTHER, lambda _: (out / "contact_sheet.png").unlink(missing_ok=True), force=True)
    assert read_manifest(out).config == OTHER


def test_a_file_where_the_folder_was_to_be_stays(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match="changed while the data set was built"):
        build(pictures, out, CONFIG, lambda _: out.write_text("mine"))
    assert out.read_text() == "mine"


def test_an_interrupt_between_the_renames_puts_the_old_data_set_back(
    pictures: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read_manifest(out)
    real = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name == "made":
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(pictures, out, OTHER, force=True)
    assert read_manifest(out) == first
    check_files(out, first, checksums=True)
    monkeypatch.undo()
    assert build(pictures, out, OTHER, force=True).config == OTHER
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_what_appears_between_the_renames_costs_neither(
    pictures: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read_manifest(out)
    real = Path.rename

    def late(self: Path, target: Path) -> Path:
        if self.name == "made":
            out.mkdir()
            (out / "thesis.txt").write_text("years of work")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(DataError, match="changed while the data set was built"):
        build(pictures, out, OTHER, force=True)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    (kept,) = out.parent.glob("out.building/replaced")
    check_files(kept, first, checksums=True)


def test_a_kill_between_the_renames_loses_nothing(pictures: Path, out: Path) -> None:
    first, before = read_manifest(out), (out / "manifest.json").stat().st_ino
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from training.data.build import BuildConfig, build\n"
        "real = Path.rename\n"
        "def killed(self, target):\n"
        "    if self.name == 'made':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, target)\n"
        "Path.rename = killed\n"
        "build(Path(sys.argv[1]), Path(sys.argv[2]), BuildConfig(held_out=0.3), force=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, pictures, out], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert build(pictures, out, CONFIG) == first
    assert (out / "manifest.json").stat().st_ino == before  # found again, not built again
    check_files(out, first, checksums=True)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_all_is_on_the_disk_before_the_rename(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    real_sync, real_rename = os.fsync, Path.rename

    def sync(descriptor: int) -> None:
        steps.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real_sync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        steps.append("rename")
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    build(pictures, tmp_path / "out", CONFIG)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert set(steps[: steps.index("rename")]) >= written | {"made"}
    assert steps[steps.index("rename") :] == ["rename", tmp_path.name]
