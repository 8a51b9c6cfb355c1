"""A node's memory: which steps are in it, and whose."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from training.checkpoint import memory as memories
from training.checkpoint import room
from training.checkpoint.layout import Layout
from training.checkpoint.memory import NodeMemory
from training.engine_state import Part
from training.errors import CheckpointError

RECIPE = {"recipe": 1}


def opened(root: Path, rank: int = 0, run: str = "run", of: Mapping[str, int] = RECIPE) -> NodeMemory:
    found = NodeMemory.open(root / run, rank, of, root=root)
    assert isinstance(found, NodeMemory), found
    return found


def put(memory: NodeMemory, step: int, size: int = 100, commit: bool = True) -> None:
    parts = [Part("weights", "x", (size,), 0, torch.full((size,), float(step)))]
    layout, _ = Layout.of(parts)
    memory.put(step, layout, [part.values for part in parts], {"scale": 2.0})
    if commit:
        memory.commit(step, {"use": {"step": step}})


def test_the_last_whole_steps_are_there_for_the_next_process(tmp_path: Path) -> None:
    memory = opened(tmp_path)
    assert memory.steps == []
    for step in (1, 2, 3):
        put(memory, step)
    put(memory, 4, commit=False)
    assert memory.steps == [3]
    memory.close()
    again = opened(tmp_path)
    assert again.ignored is None
    assert again.steps == [3]
    slot = again.slot(3)
    assert slot is not None
    assert slot.told == {"use": {"step": 3}}
    assert slot.slab.scalars == {"scale": 2.0}
    assert torch.equal(slot.slab.views[0], torch.full((100,), 3.0))
    put(again, 4)
    assert again.steps == [3, 4]


def test_what_is_put_in_can_be_read_before_it_is_committed_by_its_own_process(tmp_path: Path) -> None:
    memory = opened(tmp_path)
    put(memory, 5, commit=False)
    slot = memory.slot(5)
    assert slot is not None
    assert float(slot.slab.views[0][0]) == 5.0
    assert memory.steps == []


def test_a_pinned_step_stays_while_others_come_and_go(tmp_path: Path) -> None:
    memory = opened(tmp_path)
    put(memory, 1)
    slot = memory.pin(1)
    assert slot is not None
    for step in range(2, 9):
        put(memory, step)
        assert step - 1 in memory.steps
        assert torch.equal(slot.slab.views[0], torch.ones(100))
        assert memory.pin(step) is None, "one at a time"
    memory.unpin()
    put(memory, 9)
    assert memory.steps == [7, 8, 9]


@pytest.mark.parametrize("what", ["recipe", "world"])
def test_the_memory_of_something_else_is_not_gone_on_from(tmp_path: Path, what: str) -> None:
    memory = opened(tmp_path)
    put(memory, 1)
    memory.close()
    other = opened(tmp_path, of={what: 2})
    assert other.steps == []
    assert other.ignored is not None
    assert "another run, recipe" in other.ignored
    put(other, 1, size=50)
    other.close()
    assert opened(tmp_path, of={what: 2}).steps == [1]


def test_each_run_and_rank_has_its_own_and_the_last_who_leaves_removes_the_folder(tmp_path: Path) -> None:
    one, two, other = opened(tmp_path), opened(tmp_path, 1), opened(tmp_path, run="other")
    put(one, 1)
    put(two, 2)
    assert (one.steps, two.steps, other.steps) == ([1], [2], [])
    (top,) = tmp_path.glob("darkroom-*")
    assert top.stat().st_mode & 0o777 == 0o700
    one.clear()
    assert two.steps == [2]
    two.clear()
    other.clear()
    assert list(top.iterdir()) == []


def test_what_ranks_have_left_that_are_gone_is_freed_when_the_run_goes_on_from_elsewhere(tmp_path: Path) -> None:
    memory, other, gone = (opened(tmp_path, rank) for rank in (0, 1, 2))
    for each in (memory, other, gone):
        put(each, 1)
    gone.close()
    memory.renew({"recipe": 2})
    assert sorted(path.parent.name for path in tmp_path.glob("*/*/*/lock")) == ["rank-0", "rank-1"]
    assert (memory.steps, other.steps) == ([], [1])
    put(memory, 2)
    assert memory.steps == [2]


def test_two_processes_do_not_share_a_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(tmp_path)
    monkeypatch.setattr(memories, "_TAKEN_S", 0.0)
    told = NodeMemory.open(tmp_path / "run", 0, RECIPE, root=tmp_path)
    assert isinstance(told, str)
    assert "another process still uses" in told


def test_a_folder_that_is_open_to_others_is_not_used(tmp_path: Path) -> None:
    (tmp_path / f"darkroom-{os.getuid()}").mkdir(mode=0o755)
    told = NodeMemory.open(tmp_path / "run", 0, RECIPE, root=tmp_path)
    assert isinstance(told, str)
    assert "open to others" in told


def test_more_than_there_is_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = opened(tmp_path)
    monkeypatch.setattr(room, "free_bytes", lambda _: 2000)
    with pytest.raises(CheckpointError, match="too little shared memory") as caught:
        put(memory, 1)
    assert "1200 bytes for 3 states" in str(caught.value)
    assert "memory_every_steps=0" in str(caught.value)


def test_the_ranks_of_a_node_may_not_take_together_what_each_could_take_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state is 4 MB, three of them 12; of the 46 MB of the node half may be taken."""

    def free(_: Path) -> int:
        return 46_000_000 - sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("slot-*"))

    monkeypatch.setattr(room, "free_bytes", free)
    one, two = opened(tmp_path), opened(tmp_path, 1)
    put(one, 1, size=1_000_000)
    assert free(tmp_path) > 2 * 12_000_000, "alone, there would be room for the second"
    with pytest.raises(CheckpointError, match="too little shared memory") as caught:
        put(two, 1, size=1_000_000)
    assert "12000000 bytes for 3 states, beside 12000000 bytes of this node's other ranks" in str(caught.value)
    one.clear()
    put(two, 1, size=1_000_000)
    assert two.steps == [1]


def test_what_a_rank_has_put_down_counts_before_it_has_taken_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda _: 1000)
    for rank in (0, 1):
        (tmp_path / f"rank-{rank}").mkdir()
    room.claim(tmp_path / "rank-0", 300, "it")
    with pytest.raises(CheckpointError, match="beside 300 bytes"):
        room.claim(tmp_path / "rank-1", 201, "it")
    room.claim(tmp_path / "rank-1", 200, "it")
    room.claim(tmp_path / "rank-0", 300, "it")


@pytest.mark.parametrize("damage", ["layout", "header", "size"])
def test_what_is_damaged_is_not_gone_on_from(tmp_path: Path, damage: str) -> None:
    memory = opened(tmp_path)
    put(memory, 1)
    put(memory, 2)
    slot = memory.slot(2)
    assert slot is not None
    memory.close()
    if damage == "layout":
        (slot.path.parent / "layout.json").write_text("{")
    else:
        with slot.path.open("r+b") as file:
            file.seek(30 if damage == "header" else slot.path.stat().st_size)
            file.write(b"\xff")
    again = opened(tmp_path)
    assert again.steps == ([] if damage == "layout" else [1])
    put(again, 3)
    assert 3 in again.steps


def test_the_memory_of_a_run_that_nobody_went_on_with_is_freed_after_a_day(tmp_path: Path) -> None:
    forgotten, alive = opened(tmp_path, run="forgotten"), opened(tmp_path, run="alive")
    put(forgotten, 1)
    put(alive, 1)
    forgotten.close()
    long_ago = time.time() - memories.FORGOTTEN_S - 60
    for path in tmp_path.glob("darkroom-*/*/*/*"):
        os.utime(path, (long_ago, long_ago))
    opened(tmp_path, run="third")
    assert len(list(tmp_path.glob("darkroom-*/*"))) == 2
    put(alive, 2)
    alive.close()
    assert opened(tmp_path, run="alive").steps == [1, 2]
