"""The held-out loss: the same measure for every recipe, on a bounded choice of pictures, whoever cannot be read."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training import noise
from training.conditioning import Conditioning, ConditioningShape
from training.data.dataset import Dataset, Split
from training.evaluate.held_out import HeldOut, draw, measure, row_losses
from training.evaluate.pictures import read_pictures, spread
from training.models import UNetConfig, apply
from training.objectives import Network, RectifiedFlow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    unet = (
        UNetConfig(resolution=16, widths=(16, 32), attention=(False, True), head_width=16)
        .build(ConditioningShape("text", 4, 8))
        .eval()
    )
    return partial(apply, unet)


def _conditioning(count: int) -> Conditioning:
    return Conditioning(noise.normal(0, "tokens", shape=(count, 4, 8)), torch.ones(count, 4, dtype=torch.bool))


def test_no_setting_of_the_recipe_changes_the_measure(network: Network) -> None:
    images, states, ids = noise.normal(1, "images", shape=(6, 3, 16, 16)), _conditioning(6), [5, 1, 7, 30, 31, 99]
    plain = row_losses(network, RectifiedFlow(), images, states, ids, repeats=3)
    assert plain.shape == (6,)
    # the easiest times that a trial could choose for itself
    easy = RectifiedFlow(logit_mean=4, logit_std=0.01, time_shift=9, caption_dropout=0.9)
    assert torch.equal(row_losses(network, easy, images, states, ids, repeats=3), plain)
    part = row_losses(network, easy, images[4:], states.rows(slice(4, 6)), ids[4:], repeats=3)
    torch.testing.assert_close(part, plain[4:])
    assert not torch.allclose(row_losses(network, easy, images, states, [*ids[:5], 98], repeats=3)[5], plain[5])


@given(st.lists(st.integers(0, 2**31), min_size=1, max_size=5), st.integers(1, 9))
def test_the_times_of_a_picture_cover_all_of_time(ids: list[int], repeats: int) -> None:
    times = torch.stack([draw(ids, repeat, repeats, (1, 2, 2)).t for repeat in range(repeats)])
    for repeat, row in enumerate(times):
        assert (row >= repeat / repeats).all()
        assert (row <= (repeat + 1) / repeats).all()


@given(st.integers(0, 5000), st.integers(0, 600))
def test_a_choice_is_spread_and_bounded(count: int, most: int) -> None:
    chosen = spread(count, most)
    assert len(chosen) == min(count, most)
    assert chosen == spread(count, most)
    for number, sample_id in enumerate(chosen):
        assert number * count // len(chosen) <= sample_id < (number + 1) * count // len(chosen)


def test_a_choice_sees_every_kind_where_kinds_take_turns() -> None:
    kinds = [sample_id % 2 for sample_id in spread(400, 100)]
    assert 30 <= sum(kinds) <= 70


@pytest.fixture
def damaged(tiny_data: Path, tmp_path: Path) -> Split:
    """The training pictures, the third of them overwritten."""
    shutil.copytree(tiny_data, tmp_path / "data")
    split = Dataset.open(tmp_path / "data").split("train")
    wanted = split.encoded(2)
    for shard in (tmp_path / "data").rglob("*.tar"):
        data = shard.read_bytes()
        if wanted in data:
            shard.write_bytes(data.replace(wanted, bytes(len(wanted))))
    return Dataset.open(tmp_path / "data").split("train")


def test_an_unreadable_picture_moves_no_other(
    network: Network, damaged: Split, tiny_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = list(range(0, len(damaged), 2))
    whole = HeldOut(Dataset.open(tiny_data).split("train"), ids, _conditioning(len(ids)))
    options = {"resolution": 16, "repeats": 2, "device": CPU}
    before = measure(network, RectifiedFlow(), whole, range(len(ids)), batch=4, **options)
    assert (before[:, 1] == 1).all()
    hurt = HeldOut(damaged, ids, whole.states)
    after = measure(network, RectifiedFlow(), hurt, range(len(ids)), batch=4, **options)
    assert after[1].tolist() == [0, 0]
    others = [row for row in range(len(ids)) if row != 1]
    torch.testing.assert_close(after[others], before[others])
    assert "Left out train[2]" in caplog.text
    # as a second worker would measure its share
    torch.testing.assert_close(measure(network, RectifiedFlow(), hurt, [3, 1, 5], batch=2, **options), after[[3, 1, 5]])
    pixels, places = read_pictures(damaged, [1, 2, 3], 16)
    assert (pixels.dtype, tuple(pixels.shape), places) == (torch.uint8, (2, 3, 16, 16), [0, 2])


def test_no_forward_pass_is_larger_than_asked(network: Network, tiny_data: Path) -> None:
    split = Dataset.open(tiny_data).split("train")
    seen = []

    def watched(x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        seen.append(len(x))
        return network(x, t, conditioning)

    held_out = HeldOut(split, range(len(split)), _conditioning(len(split)))
    measure(watched, RectifiedFlow(), held_out, range(len(split)), resolution=16, repeats=1, batch=5, device=CPU)
    assert max(seen) == 5
    assert sum(seen) == len(split)
