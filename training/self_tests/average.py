"""The averaged weights: an average that is never updated looks like one that is, and is what gets published."""

from __future__ import annotations

from training.ema import EmaConfig
from training.self_tests.finding import Finding, measured, reached
from training.self_tests.ground import Ground, largest_difference

STEPS = 4
STAGES = (1, 3)
CONFIG = EmaConfig(decay=0.6)
"""Short enough that a few steps move the average far beyond rounding."""
MEND = (
    "the average would be published instead of a trained model: look at training.ema and at the engine's parts()"
    " under this ZeRO stage"
)


def check(ground: Ground) -> Finding:
    """The average equals that of the formula over the weights of every step, in float64; and it is not the start."""
    moved, gaps = {}, {}
    for stage in STAGES:
        moved[stage], gaps[stage] = _under(ground, stage)
    least = min(moved.values())
    found = reached("average", least, 1e-4, f"moved by {least:.1e} of its size in {STEPS} steps", MEND)
    if not found.ok:
        return found
    stage = max(gaps, key=lambda stage: gaps[stage][0])
    gap, where = gaps[stage]
    detail = f"moved by {least:.1e}; within {gap:.1e} of the formula ({where or 'every weight'} under ZeRO {stage})"
    return measured("average", gap, 1e-6, detail, MEND)


def _under(ground: Ground, stage: int) -> tuple[float, tuple[float, str]]:
    """How far the average has moved from the start, and how far it is from the formula."""
    engine = ground.engine(stage)
    ema = ground.average(engine, CONFIG)
    start = {name: weight.double() for name, weight in engine.whole("weights").items()}
    expected = dict(start)

    def follow(step: int) -> None:
        ema.update(step)
        decay = min(0.6, (1 + step) / (10 + step))
        for name, weight in engine.whole("weights").items():
            expected[name] = decay * expected[name] + (1 - decay) * weight.double()

    ground.train(engine, 0, STEPS, follow)
    average = ema.whole()
    return largest_difference(average, start)[0], largest_difference(average, expected)
