"""How wide calls are: chosen from tables, measured with a clock of ours, and kept for every process."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest

from serving.bucket import Bucket
from serving.config import BatchConfig
from serving.width_store import WidthStore
from serving.widths import Size, Widths, best_width, candidates, measured


@pytest.mark.parametrize(
    ("seconds", "tolerance", "width"),
    [
        ({1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}, 0.1, 1),  # a CPU: every row costs the same
        ({1: 1.0, 2: 1.1, 4: 1.2, 8: 1.3}, 0.1, 8),  # a GPU with room left
        ({1: 1.0, 2: 1.1, 4: 1.2, 8: 2.3}, 0.1, 4),  # full at 4
        ({1: 1.0, 2: 1.1, 4: 1.2, 8: 2.3}, 0.0, 8),
        ({1: 1.0, 2: 1.1, 4: 1.2, 8: 5.0}, 0.0, 4),  # slower beyond 4
        ({2: 7.0}, 0.0, 2),
    ],
)
def test_the_narrowest_width_that_is_nearly_the_best(seconds: dict[int, float], tolerance: float, width: int) -> None:
    assert best_width(seconds, tolerance) == width


def test_widths_that_are_tried_are_powers_of_two() -> None:
    assert candidates(8) == [1, 2, 4, 8]
    assert candidates(7) == [1, 2, 4]
    assert candidates(1) == [1]


def timed(costs: dict[int, float]) -> tuple[dict[int, float], list[int]]:
    """What a device of these costs is measured to take, and the calls that were made."""
    now, made = 0.0, []

    def call(rows: int) -> None:
        nonlocal now
        made.append(rows)
        now += costs[rows] * (3 if made.count(rows) == 1 else 1)  # the first call warms up
        if costs[rows] < 0:
            raise RuntimeError("out of memory")

    return measured(call, costs, lambda: now), made


def test_a_measurement_leaves_the_warm_up_out_and_ends_where_nothing_is_gained() -> None:
    table, made = timed({1: 1.0, 2: 1.0, 4: 1.0, 8: 9.0, 16: 9.0})
    assert table == {1: 1.0, 2: 1.0, 4: 1.0, 8: 9.0}
    assert made == [1] * 4 + [2] * 4 + [4] * 4 + [8] * 4


def test_a_width_without_memory_ends_it_and_the_first_one_must_do() -> None:
    table, _ = timed({1: 1.0, 2: 1.0, 4: -1.0, 8: 1.0})
    assert set(table) == {1, 2}
    with pytest.raises(RuntimeError, match="out of memory"):
        timed({1: -1.0})


def test_a_size_is_settled_once_and_its_calls_have_a_running_mean() -> None:
    calls: list[int] = []
    widths = Widths(BatchConfig(padded_rows=2))
    assert not widths.settled(Size(8, 8))
    widths.settle(Size(8, 8), calls.append)
    widths.settle(Size(8, 8), calls.append)
    assert calls == [2] * 4
    bucket = Bucket(8, 8, "sepia")
    for _ in range(200):
        widths.took(bucket, 2, 3.0)
    assert widths.call_of(bucket).rows == 2
    assert widths.call_of(bucket).seconds == pytest.approx(1.5)


def test_a_width_that_was_kept_is_not_measured_again(tmp_path: Path) -> None:
    store = WidthStore(tmp_path, "weights", "device")
    assert store.keep(Size(8, 8), 4) == 4
    assert store.keep(Size(8, 8), 2) == 4, "the first one has decided"
    calls: list[int] = []
    widths = Widths(BatchConfig(), WidthStore(tmp_path, "weights", "device"))
    widths.settle(Size(8, 8), calls.append)
    assert set(calls) == {4}
    assert WidthStore(tmp_path, "other weights", "device").width(Size(8, 8)) is None
    assert store.width(Size(8, 16)) is None


@pytest.mark.parametrize("damage", ["", "four", "0", "-3"])
def test_a_damaged_file_is_measured_past(tmp_path: Path, damage: str) -> None:
    store = WidthStore(tmp_path, "weights")
    store.keep(Size(8, 8), 4)
    (file,) = store.folder.iterdir()
    file.write_text(damage)
    assert store.width(Size(8, 8)) is None


def test_processes_that_measure_at_once_agree(tmp_path: Path) -> None:
    stores = [WidthStore(tmp_path, "weights") for _ in range(8)]
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda store=store, width=width: found.append(store.keep(Size(8, 8), width)))
        for store, width in zip(stores, itertools.cycle([1, 2, 4, 8]), strict=False)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
