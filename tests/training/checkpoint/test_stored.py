"""Checkpoints in storage: whole or absent. Bits are flipped, and the newest whole one is found."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from training.checkpoint import MANIFEST, Checkpoint, CheckpointConfig, newest, read, save
from training.errors import CheckpointError
from training.noise import normal

FILES = tuple(f"{kind}-00000-of-00001.safetensors" for kind in ("weights", "ema", "optimizer"))
Groups = Mapping[str, Mapping[str, torch.Tensor]]


def state(step: int) -> Groups:
    """A run's state at a step: of several shapes, strides and types."""
    weights = {"a.weight": normal(step, "a", shape=(4, 3)), "a.bias": normal(step, "b", shape=(7,))}
    moments = {"step": torch.tensor(float(step)), "a.weight": normal(step, "m", shape=(3, 4)).t()}
    averages = {name: value / 2 for name, value in weights.items()}
    return {"weights": weights, "ema": averages, "optimizer.exp_avg": moments}


def keep_one(folder: Path, step: int, keep: int = 100) -> Checkpoint:
    kept = CheckpointConfig(keep=keep)
    return save(folder, step=step, position=step * 8, groups=state(step), about={"at": step}, config=kept)


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
    assert found == saved
    assert saved.path == str(tmp_path / "step-00000003")
    assert (saved.step, saved.position, saved.about) == (3, 24, {"at": 3})
    assert refused == []
    same(saved, 3)


def test_no_number_is_changed_on_the_way(tmp_path: Path) -> None:
    awkward = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, 3.4e38, 1 / 3])
    types = {"wide": awkward.double(), "half": awkward.bfloat16(), "whole": torch.arange(5), "empty": torch.empty(0, 3)}
    groups = {"weights": {"awkward": awkward, **types, "none": torch.tensor(True)}}
    saved = save(tmp_path, step=0, position=0, groups=groups, about={})
    loaded = read(Path(saved.path)).load("weights")
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
    saved = save(tmp_path, step=1, position=2**40, groups=state(1), about=about)
    found = read(Path(saved.path))
    assert found.about == about
    assert found.position == 2**40


def test_nothing_but_json_and_safetensors_is_in_there(tmp_path: Path) -> None:
    saved = keep_one(tmp_path, 1)
    path = Path(saved.path)
    assert {file.name for file in path.iterdir()} == {MANIFEST, *FILES}
    assert json.loads((path / MANIFEST).read_text())["version"] == 2
    for name in FILES:
        with safe_open(path / name, framework="pt") as opened:
            assert opened.keys()
    # what one process holds whole has its own names
    assert torch.equal(load_file(path / FILES[0])["a.bias"], state(1)["weights"]["a.bias"])
    assert list(tmp_path.iterdir()) == [path], "no partial folder is left"


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
        (folder / "partial-00000004-dead").mkdir()
    assert newest(folder) == (None, [])


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_few_are_kept(tmp_path: Path, keep: int) -> None:
    for step in range(1, 6):
        keep_one(tmp_path, step, keep)
        assert steps(tmp_path) == list(range(max(1, step - keep + 1), step + 1))


def test_what_was_just_saved_stays_and_later_steps_go(tmp_path: Path) -> None:
    """Step 20 is damaged, the run goes on from 10 and saves 15: with one to keep, it is that one."""
    keep_one(tmp_path, 10)
    (Path(keep_one(tmp_path, 20).path) / FILES[1]).unlink()
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
    (partial,) = {Path(name).parent for name in flushed if name.endswith(MANIFEST)}
    assert partial.name.startswith("partial-00000001-")
    parts = [str(partial / name) for name in sorted(FILES)]
    before = [str(tmp_path), str(folder), *parts, str(partial)]
    assert flushed == [*before, str(partial / MANIFEST), str(partial), str(folder)]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    keep_one(tmp_path, 4)
    changed = {"weights": {"x": torch.ones(2)}}
    saved = save(tmp_path, step=4, position=1, groups=changed, about={})
    assert steps(tmp_path) == [4]
    assert read(Path(saved.path)).load("weights").keys() == {"x"}


@pytest.mark.parametrize("part", [MANIFEST, *FILES])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "longer"])
def test_a_damaged_part_is_named_and_the_one_before_is_taken(tmp_path: Path, part: str, damage: str) -> None:
    keep_one(tmp_path, 1)
    path = Path(keep_one(tmp_path, 2).path) / part
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
def test_a_flipped_bit_anywhere_is_seen(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("flip")
    keep_one(folder, 1)
    newer = keep_one(folder, 2).path
    path = Path(newer) / data.draw(st.sampled_from([MANIFEST, *FILES]))
    content = bytearray(path.read_bytes())
    # a manifest's length depends on the time
    content[data.draw(st.integers(0, 1 << 30)) % len(content)] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    found, refused = newest(folder)
    assert found is not None
    assert found.step == 1
    (reason,) = refused
    assert "altered" in reason
    assert str(path) in reason
    shutil.rmtree(folder)


def test_when_all_are_damaged_there_is_none_and_each_is_named(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        (Path(keep_one(tmp_path, step).path) / FILES[1]).unlink()
    found, refused = newest(tmp_path)
    assert found is None
    assert [f"step-{step:08d}" in reason for step, reason in zip((3, 2, 1), refused, strict=True)] == [True] * 3


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '"x"'])
def test_a_manifest_that_cannot_be_read_is_told(tmp_path: Path, text: str) -> None:
    path = Path(keep_one(tmp_path, 1).path) / MANIFEST
    path.write_text(text)
    with pytest.raises(CheckpointError, match="manifest cannot be read"):
        read(path.parent)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    saved = keep_one(tmp_path, 1)
    outside = tmp_path / "outside.safetensors"
    shutil.copy(Path(saved.path) / FILES[1], outside)
    files = {**saved.manifest.files, f"../{outside.name}": saved.manifest.files[FILES[1]]}
    (Path(saved.path) / MANIFEST).write_bytes(saved.manifest.model_copy(update={"files": files}).sealed())
    with pytest.raises(CheckpointError, match="outside"):
        read(Path(saved.path))


@pytest.mark.parametrize("parts", range(5))
def test_what_a_crash_left_is_no_checkpoint_and_the_next_save_collects_it(tmp_path: Path, parts: int) -> None:
    keep_one(tmp_path, 1)
    whole = Path(keep_one(tmp_path, 2).path)
    partial = tmp_path / "partial-00000002-dead"
    whole.rename(partial)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == MANIFEST)[parts:]:
        path.unlink()
    found, refused = newest(tmp_path)
    assert found is not None
    assert (found.step, refused) == (1, [])
    keep_one(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]
