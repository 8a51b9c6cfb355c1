"""The averaged weights: the closed form, that they move, and that a source gives them back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from training.ema import Ema, EmaConfig
from training.engine_state import Part
from training.noise import normal
from training.optim import ScheduleFreeConfig


def weights() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(normal(0, index, shape=shape)) for index, shape in enumerate([(12,), (5,), (1,)])]


def averaged(config: EmaConfig, live: list[torch.nn.Parameter]) -> Ema:
    """An average over whole weights, as one rank holds them."""
    parts = [
        Part("weights", str(number), tuple(weight.shape), 0, weight.detach().view(-1))
        for number, weight in enumerate(live)
    ]
    return Ema(config, parts, torch.device("cpu"))


def walk(live: list[torch.nn.Parameter], step: int) -> None:
    """What an optimizer does: change the weights in place."""
    with torch.no_grad():
        for index, tensor in enumerate(live):
            tensor.add_(normal(1, step, index, shape=tuple(tensor.shape)))


def test_the_average_is_the_closed_form() -> None:
    live = weights()
    ema = averaged(EmaConfig(decay=0.9), live)
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
    ema = averaged(EmaConfig(decay=0.99), live)
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
    ema = averaged(EmaConfig(), live)
    for tensor, average in zip(live, ema.average, strict=True):
        assert torch.equal(tensor.view(-1), average)
        assert tensor.data_ptr() != average.data_ptr()
        assert not average.requires_grad
    walk(live, 0)
    assert not torch.equal(live[0], ema.average[0])


def test_no_decay_follows_the_weights() -> None:
    live = weights()
    ema = averaged(EmaConfig(decay=0), live)
    walk(live, 0)
    ema.update(0)
    assert all(torch.allclose(tensor, average) for tensor, average in zip(live, ema.average, strict=True))


def test_its_parts_are_views_of_it_under_the_weights_names() -> None:
    live = weights()
    ema = averaged(EmaConfig(), live)
    parts = ema.parts()
    assert ema.parts() is parts, "a writer may know by that that nothing has moved"
    assert [(part.group, part.name, part.shape, part.start) for part in parts] == [
        ("ema", "0", (12,), 0),
        ("ema", "1", (5,), 0),
        ("ema", "2", (1,), 0),
    ]
    walk(live, 0)
    ema.update(0)
    assert all(torch.equal(part.values, mean) for part, mean in zip(parts, ema.average, strict=True))


def test_a_schedule_free_optimizers_own_average_is_the_one_that_is_published() -> None:
    """Bit for bit what the library's ``eval()`` makes of the weights is not asked; the same number is."""
    live = weights()
    config = ScheduleFreeConfig(learning_rate=0.1)
    optimizer = config.build([(str(number), weight) for number, weight in enumerate(live)], {})
    for weight in live:
        optimizer.state[weight] = config.fresh(weight, {})
    ahead = [optimizer.state[weight]["z"] for weight in live]

    def average_into(tensors: list[torch.Tensor]) -> None:
        for tensor, weight, z in zip(tensors, live, ahead, strict=True):
            tensor.copy_(weight.detach().lerp(z, 1 - 1 / config.beta1).view(-1))

    parts = [Part("weights", str(n), tuple(w.shape), 0, w.detach().view(-1)) for n, w in enumerate(live)]
    ema = Ema(EmaConfig(), parts, torch.device("cpu"), average_into)
    for step in range(5):
        for weight in live:
            weight.grad = normal(2, step, shape=tuple(weight.shape))
        optimizer.step()
        ema.update(step)
    optimizer.eval()  # type: ignore[attr-defined]  # the library's
    for mean, weight in zip(ema.average, live, strict=True):
        assert torch.allclose(mean, weight.detach().view(-1), atol=1e-6)


@pytest.mark.parametrize("decay", [-0.1, 1, 1.5])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValidationError, match="decay"):
        EmaConfig(decay=decay)
