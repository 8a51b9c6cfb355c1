"""Saves beside the training: never two at once, errors told, old ones gone."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from training.checkpoint import CheckpointConfig, found_in, newest
from training.checkpoint.layout import Layout
from training.checkpoint.slab import Slab
from training.checkpoint.stored import Checkpoint
from training.checkpoint.writer import Save, Writer
from training.data.storage import Folder
from training.engine_state import Part
from training.errors import StorageError


def nothing() -> None:
    """Nothing has to happen first, or last."""


def a_save(step: int, metrics: dict[str, float] | None = None, **more: Any) -> Save:
    parts = [Part("weights", "x", (4,), 0, torch.full((4,), float(step)))]
    layout, order = Layout.of(parts)
    slab = Slab(layout)
    slab.fill([parts[number].values for number in order], {"optimizer.0.step": float(step)})
    return Save(step, step * 8, slab, metrics or {}, {"at": step}, **{"first": nothing, "release": nothing, **more})


def writer_at(folder: Path, **config: Any) -> Writer:
    return Writer(Folder.at(folder), CheckpointConfig(**config), "attempt")


def steps(folder: Path) -> list[int]:
    return [found.step for found in found_in(folder) if isinstance(found, Checkpoint)]


def test_the_training_goes_on_while_a_save_is_written_and_the_next_save_waits(tmp_path: Path) -> None:
    may_commit, begun = threading.Event(), threading.Event()
    writer = writer_at(tmp_path)
    writer.begin(a_save(1, first=may_commit.wait))
    assert writer.busy
    assert (writer.written(), steps(tmp_path)) == ([], [])

    def next_one() -> None:
        begun.set()
        writer.begin(a_save(2))

    waiting = threading.Thread(target=next_one)
    waiting.start()
    begun.wait()
    assert waiting.is_alive()
    assert steps(tmp_path) == []
    may_commit.set()
    waiting.join()
    writer.wait()
    assert [saved.step for saved in writer.written()] == [1, 2]
    assert writer.written() == []
    assert steps(tmp_path) == [2, 1]


def test_what_is_saved_may_change_once_its_files_are_written(tmp_path: Path) -> None:
    released = threading.Event()
    writer = writer_at(tmp_path)
    slab = a_save(1).slab

    def change() -> None:
        released.wait()
        slab.fill([torch.full((4,), -1.0)], {"optimizer.0.step": 2.0})

    writer.begin(Save(1, 8, slab, {}, {}, change, released.set))
    writer.wait()
    found, refused = newest(tmp_path)
    assert found is not None
    assert refused == []
    assert torch.equal(found.load("weights")["x"], torch.ones(4))
    assert found.source().scalars == {"optimizer.0.step": 1.0}


def test_a_save_that_fails_is_told_by_the_next_and_leaves_what_was_there(tmp_path: Path) -> None:
    writer = writer_at(tmp_path)
    writer.begin(a_save(1))
    writer.wait()

    def full() -> None:
        raise StorageError(
            "The ledger of use cannot be written.", value="use/steps.bin", rule="No space left on device"
        )

    writer.begin(a_save(2, first=full))
    released: list[int] = []
    with pytest.raises(StorageError, match="No space left"):
        writer.begin(a_save(3, release=lambda: released.append(3)))
    assert released == [3]
    assert steps(tmp_path) == [1]
    assert len(list(tmp_path.glob("partial-*"))) == 1
    again = writer_at(tmp_path)
    again.begin(a_save(4))
    again.wait()
    assert steps(tmp_path) == [4, 1]
    assert list(tmp_path.glob("partial-*")) == [], "what the failed save left is collected"


def test_storage_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    writer = writer_at(tmp_path / "file" / "checkpoints")
    writer.begin(a_save(1))
    with pytest.raises(StorageError, match="cannot be written") as caught:
        writer.wait()
    assert str(tmp_path / "file") in str(caught.value)
    assert "Not a directory" in str(caught.value)
    assert "the same command goes on" in str(caught.value)


def test_the_best_are_kept_besides_the_newest(tmp_path: Path) -> None:
    writer = writer_at(tmp_path, keep=2, keep_best=2, best_metric="held_out_loss")
    losses = {1: 0.5, 2: 0.1, 3: None, 4: 0.3, 5: 0.9, 6: None, 7: 0.8}
    for step, loss in losses.items():
        writer.begin(a_save(step, {} if loss is None else {"held_out_loss": loss}))
    writer.wait()
    assert steps(tmp_path) == [7, 6, 4, 2]


def test_with_equal_metrics_the_newer_is_the_better(tmp_path: Path) -> None:
    writer = writer_at(tmp_path, keep=1, keep_best=1)
    for step in range(1, 5):
        writer.begin(a_save(step, {"held_out_loss": 0.5 if step < 4 else 0.7}))
    writer.wait()
    assert steps(tmp_path) == [4, 3]
