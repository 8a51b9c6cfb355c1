"""Checkpoints: whole or absent. Bits are flipped and crashes left behind, and the newest whole one is found."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from training.checkpoint import MANIFEST, Checkpoint, newest, read, save
from training.errors import CheckpointError
from training.noise import normal

Groups = Mapping[str, Mapping[str, torch.Tensor]]


def state(step: int) -> Groups:
    """A run's state at a step: of several shapes, strides and types."""
    weights = {"a.weight": normal(step, "a", shape=(4, 3)), "a.bias": normal(step, "b", shape=(7,))}
    optimizer = {"step": torch.tensor(float(step)), "a.weight/exp_avg": normal(step, "m", shape=(3, 4)).t()}
    return {"weights": weights, "ema": {name: value / 2 for name, value in weights.items()}, "optimizer": optimizer}


def keep_one(folder: Path, step: int, keep: int = 100) -> Checkpoint:
    return save(folder, step=step, position=step * 8, groups=state(step), about={"at": step}, keep=keep)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.iterdir() if path.name.startswith("step-"))


def same(found: Checkpoint, step: int) -> None:
    for group, tensors in state(step).items():
        loaded = found.load(group)
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_what_was_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    saved = keep_one(tmp_path, 3)
    found, refused = newest(tmp_path)
    assert found == saved == Checkpoint(tmp_path / "step-00000003", 3, 24, {"at": 3})
    assert refused == []
    same(saved, 3)


def test_no_number_is_changed_on_the_way(tmp_path: Path) -> None:
    awkward = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, 3.4e38, 1 / 3])
    types = {"wide": awkward.double(), "half": awkward.bfloat16(), "whole": torch.arange(5), "empty": torch.empty(0, 3)}
    groups = {"weights": {"awkward": awkward, **types, "none": torch.tensor(True)}}
    saved = save(tmp_path, step=0, position=0, groups=groups, about={}, keep=1)
    loaded = read(saved.path).load("weights")
    for name, tensor in groups["weights"].items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert bytes(loaded[name].reshape(-1).view(torch.uint8)) == bytes(tensor.reshape(-1).view(torch.uint8))


def test_about_comes_back_as_it_went(tmp_path: Path) -> None:
    about = {
        "config": {"steps": 3, "rate": 1e-3, "widths": [1, 2]},
        "data_hash": "0" * 64,
        "text": "é\n\"'",
        "no": None,
    }
    saved = save(tmp_path, step=1, position=2**40, groups=state(1), about=about, keep=1)
    found = read(saved.path)
    assert found.about == about
    assert found.position == 2**40


def test_nothing_but_json_and_safetensors_is_in_there(tmp_path: Path) -> None:
    saved = keep_one(tmp_path, 1)
    names = {path.name for path in saved.path.iterdir()}
    assert names == {MANIFEST, "weights.safetensors", "ema.safetensors", "optimizer.safetensors"}
    assert json.loads((saved.path / MANIFEST).read_text())["schema"] == 1
    for name in names - {MANIFEST}:
        with safe_open(saved.path / name, framework="pt") as opened:
            assert opened.keys()
    assert list(tmp_path.iterdir()) == [saved.path], "no partial folder is left"


def test_the_newest_is_found_by_number_and_not_by_age_or_spelling(tmp_path: Path) -> None:
    for step in (9, 10, 100_000_000):
        keep_one(tmp_path, step)
    os.utime(tmp_path / "step-00000009")
    found, _ = newest(tmp_path)
    assert found is not None
    assert found.step == 100_000_000


@pytest.mark.parametrize("there", [False, True])
def test_where_there_is_none_there_is_none(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "checkpoints"
    if there:
        folder.mkdir()
        (folder / "step-1").mkdir()
        (folder / "notes.txt").touch()
        (folder / "partial-00000004").mkdir()
    assert newest(folder) == (None, [])


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_few_are_kept(tmp_path: Path, keep: int) -> None:
    for step in range(1, 6):
        keep_one(tmp_path, step, keep)
        assert steps(tmp_path) == list(range(max(1, step - keep + 1), step + 1))


def test_what_was_just_saved_stays_and_later_steps_go(tmp_path: Path) -> None:
    """Step 20 is damaged, the run goes on from 10 and saves 15: with one to keep, it is that one."""
    keep_one(tmp_path, 10)
    (keep_one(tmp_path, 20).path / "ema.safetensors").unlink()
    found, _ = newest(tmp_path)
    assert found is not None
    assert found.step == 10
    keep_one(tmp_path, 15, keep=1)
    assert steps(tmp_path) == [15]
    same(read(tmp_path / "step-00000015"), 15)


def test_everything_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    fsync = os.fsync

    def note(handle: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{handle}"))  # noqa: PTH115  as the kernel names it at this moment
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    folder = tmp_path / "checkpoints"
    keep_one(folder, 1)
    partial = folder / "partial-00000001"
    parts = [str(partial / name) for name in ("weights.safetensors", "ema.safetensors", "optimizer.safetensors")]
    assert flushed == [str(tmp_path), *parts, str(partial / MANIFEST), str(partial), str(folder)]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    keep_one(tmp_path, 4)
    changed = {"weights": {"x": torch.ones(2)}}
    saved = save(tmp_path, step=4, position=1, groups=changed, about={}, keep=1)
    assert steps(tmp_path) == [4]
    assert read(saved.path).load("weights").keys() == {"x"}


@pytest.mark.parametrize("part", [MANIFEST, "weights.safetensors", "ema.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "longer"])
def test_a_damaged_part_is_named_and_the_one_before_is_taken(tmp_path: Path, part: str, damage: str) -> None:
    keep_one(tmp_path, 1)
    path = keep_one(tmp_path, 2).path / part
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": content[:-1], "longer": content + b"}"}[damage])
    with pytest.raises(CheckpointError) as caught:
        read(path.parent)
    assert str(path) in str(caught.value)
    found, refused = newest(tmp_path)
    assert found is not None
    assert refused == [str(caught.value)]
    assert found.step == 1
    same(found, 1)


@settings(max_examples=60)
@given(st.data())
def test_a_flipped_bit_anywhere_in_the_tensors_is_seen(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    keep_one(folder, 1)
    newer = keep_one(folder, 2).path
    path = newer / f"{data.draw(st.sampled_from(['weights', 'ema', 'optimizer']))}.safetensors"
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    found, refused = newest(folder)
    assert found is not None
    assert found.step == 1
    (reason,) = refused
    assert f"{path.name} is missing or altered" in reason
    assert str(path) in reason
    shutil.rmtree(folder)


def test_when_all_are_damaged_there_is_none_and_each_is_named(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        (keep_one(tmp_path, step).path / "ema.safetensors").unlink()
    found, refused = newest(tmp_path)
    assert found is None
    assert [f"step-{step:08d}" in reason for step, reason in zip((3, 2, 1), refused, strict=True)] == [True] * 3


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '"x"'])
def test_a_manifest_that_cannot_be_read_is_told(tmp_path: Path, text: str) -> None:
    path = keep_one(tmp_path, 1).path / MANIFEST
    path.write_text(text)
    with pytest.raises(CheckpointError, match="manifest cannot be read"):
        read(path.parent)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    saved = keep_one(tmp_path, 1)
    outside = tmp_path / "outside.safetensors"
    shutil.copy(saved.path / "ema.safetensors", outside)
    manifest = json.loads((saved.path / MANIFEST).read_text())
    manifest["files"][f"../{outside.name}"] = manifest["files"].pop("ema.safetensors")
    (saved.path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside"):
        read(saved.path)


@pytest.mark.parametrize("parts", range(5))
def test_what_a_crash_left_is_no_checkpoint_and_the_next_save_collects_it(tmp_path: Path, parts: int) -> None:
    keep_one(tmp_path, 1)
    whole = keep_one(tmp_path, 2).path
    partial = tmp_path / "partial-00000002"
    whole.rename(partial)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == MANIFEST)[parts:]:
        path.unlink()
    found, refused = newest(tmp_path)
    assert found is not None
    assert (found.step, refused) == (1, [])
    keep_one(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def count_operations(folder: Path, kill_at: int) -> int:
    """Save step 2 in a forked process that is killed at file operation number ``kill_at``; returns its wait status.

    Without a kill it exits with the number of operations.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    done = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal done
        if event in {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"}:
            done += 1
            if done == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    groups = {name: {"x": torch.full((50,), 2.0)} for name in ("weights", "ema")}
    sys.addaudithook(count)
    try:
        save(folder, step=2, position=16, groups=groups, about={}, keep=1)
    finally:
        os._exit(done)


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """The process is killed at each of its file operations in turn, in the order in which they come."""
    first = tmp_path / "first"
    save(first, step=1, position=8, groups={"weights": {"x": torch.ones(50)}}, about={}, keep=1)
    operations = os.waitstatus_to_exitcode(count_operations(shutil.copytree(first, tmp_path / "whole"), 0))
    assert operations > 10
    seen = set()
    for place in range(1, operations + 1):
        folder = shutil.copytree(first, tmp_path / f"killed-{place}")
        assert os.waitstatus_to_exitcode(count_operations(folder, place)) == -signal.SIGKILL
        found, refused = newest(folder)
        assert found is not None, f"killed at operation {place}"
        assert refused == []
        assert torch.equal(found.load("weights")["x"], torch.full((50,), float(found.step)))
        seen.add(found.step)
        save(folder, step=3, position=24, groups={"weights": {"x": torch.ones(1)}}, about={}, keep=1)
        assert [path.name for path in folder.iterdir()] == ["step-00000003"], "all that was left is collected"
    assert seen == {1, 2}
