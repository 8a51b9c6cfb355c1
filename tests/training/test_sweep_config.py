"""Sweeps: searches are read or refused in words, and a trial's values depend on its number alone."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from training.errors import ConfigError
from training.sweep_config import Choice, SweepConfig, Uniform, parse_domain

SEEDS = st.integers(0, 2**31)
KEYS = st.text("abc._", min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("text", "key", "domain"),
    [
        ("a.b=choice(1, 2, 3)", "a.b", Choice(values=(1, 2, 3))),
        ("name=choice(x)", "name", Choice(values=("x",))),
        ("lr=choice(1e-3, 2E-4)", "lr", Choice(values=(1e-3, 2e-4))),
        ("a=choice(true, null, two words)", "a", Choice(values=(True, None, "two words"))),
        ("a=choice([8, 16], [16, 32])", "a", Choice(values=([8, 16], [16, 32]))),
        ("  a.b = uniform( 0 , 0.5 ) ", "a.b", Uniform(kind="uniform", low=0, high=0.5)),
        ("a=uniform(-1, 1)", "a", Uniform(kind="uniform", low=-1, high=1)),
        ("o.learning_rate=loguniform(1e-4, 1e-2)", "o.learning_rate", Uniform(kind="loguniform", low=1e-4, high=1e-2)),
    ],
)
def test_a_search_is_read(text: str, key: str, domain: Choice | Uniform) -> None:
    assert parse_domain(text) == (key, domain)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a", "A search cannot be read."),
        ("a=", "A search cannot be read."),
        ("a=3", "A search cannot be read."),
        ("=choice(1)", "A search cannot be read."),
        ("a=normal(0, 1)", "A search cannot be read."),
        ("a=choice(1", "A search cannot be read."),
        ("a=choice(1]", "A search cannot be read."),
        ("a=choice([1)", "A search's values cannot be read."),
        ("a=choice()", "A choice needs values."),
        ("a=uniform(1)", "A range needs two numbers, the lower first."),
        ("a=uniform(1, 2, 3)", "A range needs two numbers, the lower first."),
        ("a=uniform(2, 1)", "A range needs two numbers, the lower first."),
        ("a=uniform(1, 1)", "A range needs two numbers, the lower first."),
        ("a=uniform(low, high)", "A range needs two numbers, the lower first."),
        ("a=loguniform(0, 1)", "A logarithm needs positive bounds."),
        ("a=loguniform(-1, 1)", "A logarithm needs positive bounds."),
    ],
)
def test_what_is_not_a_search_is_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_domain(text)
    assert words in str(caught.value)
    assert f"value:   {text!r}" in str(caught.value)
    assert "rule:" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("name", "named by its number"),
        ("steps", "the sweep's own steps"),
        ("data.path", "other pictures"),
        ("conditioning.encoder", "told other things"),
        ("evaluation.held_out_repeats", "measured another way"),
        ("checkpoint.every_steps", "itself"),
        ("tracking.experiment", "the sweep's own MLflow run"),
        ("model.resolution", "another size"),
        ("model", "name one of its fields"),
        ("evaluation", "measured another way"),
    ],
)
def test_what_would_make_trials_incomparable_is_refused(key: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SweepConfig(space={"optimizer.learning_rate": Choice(values=(1,)), key: Choice(values=(1, 2))})
    text = str(caught.value)
    assert f"A sweep cannot search {key}." in text
    assert why in text
    assert "options: seed, global_batch" in text


def test_what_only_changes_the_training_may_be_searched() -> None:
    keys = [
        "seed",
        "global_batch",
        "model.widths",
        "objective.logit_mean",
        "ema.decay",
        "engine.precision",
        "workers.count",
    ]
    assert set(SweepConfig(space={key: Choice(values=(1,)) for key in keys}).space) == set(keys)


def test_the_forms_are_listed() -> None:
    with pytest.raises(ConfigError, match=r"options: choice\(a, b, \.\.\.\), uniform\(low, high\), loguniform\(low"):
        parse_domain("a=normal(0, 1)")


@given(SEEDS, KEYS, st.integers(1, 9), st.integers(0, 50))
def test_every_round_of_choices_covers_all_values(seed: int, key: str, count: int, around: int) -> None:
    choice = Choice(values=tuple(range(count)))
    drawn = [choice.draw(seed, key, around * count + place) for place in range(count)]
    assert sorted(drawn) == list(range(count))


@given(SEEDS, KEYS, st.integers(0, 10**6), st.floats(1e-6, 1e3), st.floats(1.1, 1e3))
def test_a_range_is_kept(seed: int, key: str, trial: int, low: float, ratio: float) -> None:
    for kind in ("uniform", "loguniform"):
        value = Uniform.model_validate({"kind": kind, "low": low, "high": low * ratio}).draw(seed, key, trial)
        # a value is rounded to four digits
        assert low * (1 - 1e-3) <= value <= low * ratio * (1 + 1e-3)
        assert value == float(f"{value:.4g}")


def test_a_logarithmic_range_is_even_in_its_logarithm() -> None:
    domain = Uniform(kind="loguniform", low=1e-4, high=1e-2)
    exponents = [math.log10(domain.draw(0, "k", trial)) for trial in range(2000)]
    assert abs(sum(exponents) / len(exponents) + 3) < 0.05
    assert min(exponents) < -3.9
    assert max(exponents) > -2.1


@given(SEEDS, st.permutations(["a.b", "c", "d.e.f"]), st.lists(st.integers(0, 200), min_size=1, max_size=5))
def test_values_depend_on_seed_key_and_trial_alone(seed: int, order: list[str], trials: list[int]) -> None:
    domains = {
        "a.b": Uniform(kind="uniform", low=0, high=1),
        "c": Choice(values=("x", "y", "z")),
        "d.e.f": Uniform(kind="loguniform", low=1e-5, high=1),
    }
    whole = SweepConfig(seed=seed, space=domains)
    shuffled = SweepConfig(seed=seed, trials=99, steps=7, space={key: domains[key] for key in order})
    for trial in trials:
        assert shuffled.values(trial) == whole.values(trial), "whatever the order of the fields and of the trials"
        for key in order:
            alone = SweepConfig(seed=seed, space={key: domains[key]})
            assert alone.values(trial)[key] == whole.values(trial)[key], "whatever else is searched"


def test_other_keys_seeds_and_trials_draw_otherwise() -> None:
    domain = Uniform(kind="uniform", low=0, high=1)
    draws = [domain.draw(seed, key, trial) for seed in range(3) for key in "ab" for trial in range(20)]
    assert len(set(draws)) > 115


def test_the_draws_are_these() -> None:
    """A sweep that is run again with a newer version must find its trials unchanged."""
    domain = Uniform(kind="loguniform", low=1e-4, high=1e-2)
    assert [domain.draw(0, "optimizer.learning_rate", trial) for trial in range(4)] == [
        0.003449,
        0.0001221,
        0.00254,
        0.0002695,
    ]
    assert [Choice(values=(1, 2, 3)).draw(0, "x", trial) for trial in range(6)] == [2, 1, 3, 1, 3, 2]


@pytest.mark.parametrize("field", ["trials=0", "steps=0", "grace_steps=0", "reduction=1", "concurrent=0", "unknown=1"])
def test_a_sweep_that_cannot_be_is_refused(field: str) -> None:
    name, _, value = field.partition("=")
    with pytest.raises(ValidationError, match=name):
        SweepConfig.model_validate({"space": {}, name: float(value)})
