"""fp16's loss scale: what an overflow does to it, and that a checkpoint carries it."""

from training.loss_scale import LARGEST, PATIENCE, SMALLEST, START, LossScale


def test_an_overflow_halves_it_and_patience_doubles_it() -> None:
    scale = LossScale()
    assert scale.update(overflow=True), "a smaller one may help"
    assert (scale.value, scale.overflows) == (START / 2, 1)
    for _ in range(PATIENCE):
        assert not scale.update(overflow=False)
    assert scale.value == START
    for _ in range(20 * PATIENCE):
        scale.update(overflow=False)
    assert scale.value == LARGEST


def test_an_overflow_at_the_smallest_scale_is_not_the_scales() -> None:
    scale = LossScale()
    told = [scale.update(overflow=True) for _ in range(20)]
    assert told == [True] * 16 + [False] * 4
    assert scale.value == SMALLEST


def test_it_goes_on_from_a_checkpoint_and_begins_anew_without_one() -> None:
    scale, other, fresh = LossScale(), LossScale(), LossScale()
    scale.update(overflow=True)
    scale.update(overflow=False)
    other.take(scale.scalars())
    assert other.scalars() == scale.scalars()
    fresh.take({"optimizer.0.step": 3.0})
    assert fresh.value == START
