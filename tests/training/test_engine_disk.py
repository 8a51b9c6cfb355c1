"""Tensors whose memory is a file on a local disk."""

from pathlib import Path

import pytest
import torch

from training.engine_disk import Disk
from training.errors import ConfigError
from training.noise import normal


def test_values_on_a_disk_are_the_same_values_in_a_file_that_nobody_sees(tmp_path: Path) -> None:
    values = normal(0, "values", shape=(300, 70))
    moved = Disk(tmp_path / "made").moved(values)
    assert torch.equal(moved, values)
    assert moved.shape == values.shape
    assert list((tmp_path / "made").iterdir()) == []
    (mapped,) = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path / "made") in line]
    start, _, end = mapped.partition(" ")[0].partition("-")
    assert int(start, 16) <= moved.data_ptr() < int(end, 16)
    moved.mul_(2)
    assert torch.equal(moved, 2 * values)


def test_a_place_that_cannot_be_used_is_named_with_what_would_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="finds no place on the disk") as caught:
        Disk(tmp_path / "file").moved(torch.zeros(10))
    assert "40 bytes in a folder of a local disk: File exists" in str(caught.value)
    assert "engine.offload cpu" in str(caught.value)
