"""The averaged weights: the closed form, that they move, and that swapping leaves no trace."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from training.ema import Ema, EmaConfig
from training.noise import normal


def weights() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(normal(0, index, shape=shape)) for index, shape in enumerate([(3, 4), (5,), ()])]


def walk(live: list[torch.nn.Parameter], step: int) -> None:
    """What an optimizer does: change the weights in place."""
    with torch.no_grad():
        for index, tensor in enumerate(live):
            tensor.add_(normal(1, step, index, shape=tuple(tensor.shape)))


def test_the_average_is_the_closed_form() -> None:
    live = weights()
    ema = Ema(EmaConfig(decay=0.9), live)
    history = [[tensor.detach().double().clone() for tensor in live]]
    decays = []
    for step in range(120):
        walk(live, step)
        ema.update(step)
        history.append([tensor.detach().double().clone() for tensor in live])
        decays.append(min(0.9, (1 + step) / (10 + step)))
    # average = sum over the past of (1 - decay) times every later decay
    shares = [1.0, *(1 - decay for decay in decays)]
    for step, decay in enumerate(decays):
        shares[: step + 1] = [share * decay for share in shares[: step + 1]]
    assert sum(shares) == pytest.approx(1)
    for index, average in enumerate(ema.average):
        expected = sum(share * past[index] for share, past in zip(shares, history, strict=True))
        assert torch.allclose(average.double(), expected, atol=1e-5)


@given(st.integers(0, 10**7), st.floats(0, 0.99999))
def test_the_decay_is_short_at_first_and_never_longer_than_asked(updates: int, decay: float) -> None:
    config = EmaConfig(decay=decay)
    now, later = config.decay_at(updates), config.decay_at(updates + 1)
    assert 0 <= now <= later <= decay
    assert now == pytest.approx(min(decay, (1 + updates) / (10 + updates)))


def test_the_average_moves_and_lags() -> None:
    live = weights()
    ema = Ema(EmaConfig(decay=0.99), live)
    start = [tensor.detach().clone() for tensor in live]
    goal = [tensor + 1 for tensor in start]
    with torch.no_grad():
        for tensor, value in zip(live, goal, strict=True):
            tensor.copy_(value)
    ema.update(0)
    for before, average, end in zip(start, ema.average, goal, strict=True):
        assert not torch.equal(before, average), "a moved weight moves the average"
        assert torch.allclose(average, before + 0.9, atol=1e-6), "the first decay is a tenth"
        assert not torch.equal(average, end)
    for step in range(1, 3000):
        ema.update(step)
    for average, end in zip(ema.average, goal, strict=True):
        assert torch.allclose(average, end, atol=1e-5), "and it arrives"


def test_the_average_starts_at_the_weights_and_shares_nothing_with_them() -> None:
    live = weights()
    ema = Ema(EmaConfig(), live)
    for tensor, average in zip(live, ema.average, strict=True):
        assert torch.equal(tensor, average)
        assert tensor.data_ptr() != average.data_ptr()
        assert not average.requires_grad
    walk(live, 0)
    assert not torch.equal(live[0], ema.average[0])


def test_no_decay_follows_the_weights() -> None:
    live = weights()
    ema = Ema(EmaConfig(decay=0), live)
    walk(live, 0)
    ema.update(0)
    assert all(torch.allclose(tensor, average) for tensor, average in zip(live, ema.average, strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_swapped_shows_the_average_and_gives_the_weights_back_bit_for_bit(fails: bool) -> None:
    live = weights()
    ema = Ema(EmaConfig(), live)
    for step in range(5):
        walk(live, step)
        ema.update(step)
    before, average = [t.detach().clone() for t in live], [t.clone() for t in ema.average]
    places = [tensor.data_ptr() for tensor in live]

    def look() -> None:
        with ema.swapped():
            assert all(torch.equal(tensor, mean) for tensor, mean in zip(live, average, strict=True))
            assert not torch.equal(live[0], before[0])
            if fails:
                raise ConnectionError

    if fails:
        with pytest.raises(ConnectionError):
            look()
    else:
        look()
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(live, before, strict=True))
    assert all(torch.equal(mean, kept) for mean, kept in zip(ema.average, average, strict=True))
    assert [tensor.data_ptr() for tensor in live] == places, "the optimizer's own memory, not a copy"
    assert all(tensor.requires_grad for tensor in live)


def test_what_is_changed_inside_swapped_does_not_reach_the_average() -> None:
    live = weights()
    ema = Ema(EmaConfig(), live)
    average = [tensor.clone() for tensor in ema.average]
    with ema.swapped():
        walk(live, 0)
    assert all(torch.equal(mean, kept) for mean, kept in zip(ema.average, average, strict=True))


def test_restart_takes_the_weights_that_were_loaded() -> None:
    live = weights()
    ema = Ema(EmaConfig(), live)
    walk(live, 0)
    ema.restart()
    assert all(torch.equal(tensor, average) for tensor, average in zip(live, ema.average, strict=True))
    walk(live, 1)
    assert not torch.equal(live[0], ema.average[0])


@pytest.mark.parametrize("decay", [-0.1, 1, 1.5])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValidationError, match="decay"):
        EmaConfig(decay=decay)
