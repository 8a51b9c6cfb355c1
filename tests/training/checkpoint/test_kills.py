"""Processes are killed at every system call of a save, and at any instant of a copy into memory."""

import mmap
import os
import random
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from training.checkpoint import CheckpointConfig, newest, save
from training.checkpoint.layout import Layout
from training.checkpoint.memory import NodeMemory
from training.engine_state import Part

CALLS = ("open", "write", "fsync", "close", "mkdir", "rename", "replace", "unlink", "rmdir")
"""What a save asks of the system."""


def keep_one(folder: Path, step: int, keep: int = 1) -> None:
    groups = {name: {"x": torch.full((50,), float(step))} for name in ("weights", "ema")}
    save(folder, step=step, position=step * 8, groups=groups, about={}, config=CheckpointConfig(keep=keep))


def forked(act: Callable[[], None]) -> int:
    """``act`` in a process of its own; returns its exit code, negative for a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        torch.set_num_threads(1)  # the parent's threads are not in a fork, which would wait for them
        act()
        code = 0
    finally:
        os._exit(code)


def killed_at(place: int, count: Callable[[int], None]) -> None:
    """Wrap the system's calls so that number ``place`` is the last, a write half done."""
    done = 0

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            count(done)
            if done == place:
                if name == "write":
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counted

    for name in CALLS:
        setattr(os, name, wrapped(name, getattr(os, name)))


def test_a_kill_at_every_system_call_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    first = tmp_path / "first"
    keep_one(first, 1)
    counter = mmap.mmap(-1, 8)

    def second(folder: Path, place: int) -> Callable[[], None]:
        def act() -> None:
            killed_at(place, lambda done: struct.pack_into("q", counter, 0, done))
            keep_one(folder, 2)

        return act

    assert forked(second(shutil.copytree(first, tmp_path / "whole"), 0)) == 0
    (calls,) = struct.unpack_from("q", counter)
    assert calls > 25
    seen = set()
    for place in range(1, calls + 1):
        folder = shutil.copytree(first, tmp_path / f"killed-{place}")
        assert forked(second(folder, place)) == -signal.SIGKILL
        found, refused = newest(folder)
        assert found is not None, f"killed at call {place}"
        assert refused == []
        assert torch.equal(found.load("weights")["x"], torch.full((50,), float(found.step)))
        seen.add(found.step)
        keep_one(folder, 3)
        assert [path.name for path in folder.iterdir()] == ["step-00000003"], "all that was left is collected"
    assert seen == {1, 2}


SIZE = 1 << 19


def parts(step: int) -> list[Part]:
    """A state of 4 MiB, every element of which says of which step it is."""
    return [
        Part(group, "x", (SIZE,), 0, torch.full((SIZE,), float(step))) for group in ("weights", "optimizer.exp_avg")
    ]


@pytest.fixture
def shared() -> Iterator[mmap.mmap]:
    """Numbers that a killed process leaves behind."""
    with mmap.mmap(-1, 16) as counter:
        yield counter


def test_a_kill_at_any_instant_of_a_copy_into_memory_leaves_the_last_whole_step(
    tmp_path: Path, shared: mmap.mmap
) -> None:
    """Processes, one after another; each goes on with what the one before has left."""
    draw = random.Random(7)  # noqa: S311  when to kill
    layout, _ = Layout.of(parts(0))
    states = [[part.values for part in parts(step)] for step in range(64)]
    torn = 0

    def train(begun: int, lives_s: float) -> Callable[[], None]:
        def act() -> None:
            memory = NodeMemory.open(tmp_path / "run", 0, {"recipe": 1}, root=tmp_path)
            assert isinstance(memory, NodeMemory)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends a process at once, wherever it is
            signal.setitimer(signal.ITIMER_REAL, lives_s)
            for step in range(begun + 1, begun + 10_000):
                struct.pack_into("q", shared, 8, step)
                memory.put(step, layout, states[step % 64], {"step": float(step)})
                memory.commit(step, {"use": step})
                struct.pack_into("q", shared, 0, step)

        return act

    begun = 0
    while torn < 20:
        assert forked(train(begun, draw.uniform(0.002, 0.04))) == -signal.SIGALRM
        committed, putting = struct.unpack_from("2q", shared)
        memory = NodeMemory.open(tmp_path / "run", 0, {"recipe": 1}, root=tmp_path)
        assert isinstance(memory, NodeMemory)
        assert memory.ignored is None
        if not committed:
            memory.close()
            continue  # it came to nothing
        assert committed in memory.steps, "at most the step under way is lost"
        begun = memory.steps[-1]
        assert begun in (committed, putting)
        torn += begun < putting
        for step in memory.steps:
            slot = memory.slot(step)
            assert slot is not None
            assert slot.told == {"use": step}
            assert slot.slab.scalars == {"step": step}
            assert all(bool((view == step % 64).all()) for view in slot.slab.views)
        memory.close()
