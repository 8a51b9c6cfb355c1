"""Averages of any length after training: the profiles, their least squares, and real snapshots of a run."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from training.checkpoint.keeper import Where
from training.data.storage import Folder
from training.ema import Ema, EmaConfig, PostHocConfig
from training.ema_post_hoc import PowerProfile, Snapshot, coefficients
from training.ema_snapshots import FOLDER, Snapshots, reconstruct
from training.engine_state import Part
from training.errors import CheckpointError
from training.noise import normal

STEPS = 400


def profile(length: float, step: int) -> np.ndarray:
    """The weight that the average gives to each of the first ``step`` steps, by doing what it does."""
    shares = np.zeros(step)
    for number in range(1, step + 1):
        decay = PowerProfile.of(length).decay(number)
        shares *= decay
        shares[number - 1] += 1 - decay
    return shares


@pytest.mark.parametrize(("length", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_an_exponent_belongs_to_each_length(length: float, gamma: float) -> None:
    found = PowerProfile.of(length).gamma
    assert found == pytest.approx(gamma, abs=0.005), "as the paper's table says"
    assert math.sqrt((found + 1) / ((found + 2) ** 2 * (found + 3))) == pytest.approx(length)


@pytest.mark.parametrize("length", [0.05, 0.10, 0.2])
def test_a_profile_is_a_power_of_the_step_and_as_long_as_asked(length: float) -> None:
    shares = profile(length, STEPS)
    assert shares.sum() == pytest.approx(1)
    steps = np.arange(1, STEPS + 1)
    mean = (shares * steps).sum()
    deviation = math.sqrt((shares * (steps - mean) ** 2).sum())
    assert deviation / STEPS == pytest.approx(length, rel=0.02)
    power = (steps / STEPS) ** PowerProfile.of(length).gamma
    assert np.abs(shares - power / power.sum()).max() < 0.1 * shares.max()


@pytest.mark.parametrize("length", [0.0, -0.1, 0.28, 1.0])
def test_lengths_that_no_profile_has_are_refused(length: float) -> None:
    with pytest.raises(ValueError, match=r"above 0 and below 0\.28"):
        PowerProfile.of(length)


def test_a_kept_average_is_made_of_itself_alone() -> None:
    kept = [Snapshot(step, length) for step in (100, 200) for length in (0.05, 0.10)]
    assert coefficients(kept, kept[2]) == pytest.approx([0, 0, 1, 0], abs=1e-6)


@pytest.mark.parametrize("length", [0.06, 0.075, 0.12, 0.15])
def test_other_lengths_are_nearly_what_tracking_them_would_have_given(length: float) -> None:
    kept = [Snapshot(step, tracked) for step in range(50, STEPS + 1, 50) for tracked in (0.05, 0.10)]
    factors = coefficients(kept, Snapshot(STEPS, length))
    assert factors.sum() == pytest.approx(1, abs=0.01)
    made = np.zeros(STEPS)
    for factor, snapshot in zip(factors, kept, strict=True):
        made[: snapshot.step] += factor * profile(snapshot.length, snapshot.step)
    wanted = profile(length, STEPS)
    assert np.abs(made - wanted).sum() < 0.04, "the share of the weight that lies elsewhere"


@pytest.fixture
def alone() -> None:
    """A process group of one."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.mark.usefixtures("alone")
def test_snapshots_of_a_run_give_the_average_that_was_not_tracked(tmp_path: Path) -> None:
    config = EmaConfig(post_hoc=PostHocConfig(every_steps=50))
    wanted = EmaConfig(post_hoc=PostHocConfig(lengths=(0.075,)))
    live = normal(0, "weight", shape=(6, 4))
    weights = [Part("weights", "network.layer", (6, 4), 0, live.view(-1))]
    ema, other = (Ema(each, weights, torch.device("cpu")) for each in (config, wanted))
    assert [part.group for part in ema.parts()] == ["ema", "ema_050", "ema_100"]
    snapshots = Snapshots(config.post_hoc, STEPS, tmp_path, Where(Folder.at(tmp_path), 0, 1, "token"))
    for step in range(STEPS):
        live.add_(normal(1, step, shape=(6, 4)) * 0.1)
        ema.update(step)
        other.update(step)
        snapshots.keep(step + 1, ema.tracked)
    made = reconstruct(tmp_path, 0.075)
    assert made.keys() == {"network.layer"}
    spread = float((live - other.tracked[0].values.view(6, 4)).abs().max())
    assert float((made["network.layer"].view(-1) - other.tracked[0].values).abs().max()) < 0.02 * spread
    same = reconstruct(tmp_path, 0.05)["network.layer"].view(-1)
    assert torch.allclose(same, ema.tracked[0].values, atol=1e-5)
    with pytest.raises(CheckpointError, match="No snapshot is that old"):
        reconstruct(tmp_path, 0.05, step=49)
    snapshots.keep(STEPS, ema.tracked)  # again, as a run does that goes on from the checkpoint of that step
    again = Snapshots(config.post_hoc, 2 * STEPS, tmp_path, Where(Folder.at(tmp_path), 0, 1, "token"))
    again.keep(STEPS + 50, ema.tracked)
    again.close()
    assert (tmp_path / FOLDER / f"step-{STEPS + 50:08d}").is_dir(), "a run that leaves early waits for it"
    damaged = next((tmp_path / FOLDER).glob("step-00000200/*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    with pytest.raises(CheckpointError, match="damaged"):
        reconstruct(tmp_path, 0.075)


def test_a_run_without_snapshots_says_how_to_have_them(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no snapshots(.|\n)*ema\.post_hoc"):
        reconstruct(tmp_path, 0.1)
