"""The bias audit: intervals, effective numbers, flags, words, and which fields are audited."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.report import words
from training.data.report.bias import MIN_INPUTS, effective_number, groups_of, wilson, words_of
from training.data.report.fields import MOST_VALUES, Candidates, values_of
from training.data.report.words import Meetings, Vocabulary, words_in


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [  # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_is_the_published_interval(hits: int, count: int, low: float, high: float) -> None:
    assert wilson(hits, count) == pytest.approx((low, high), abs=5e-5)


@settings(deadline=None)
@given(hits=st.integers(0, 1000), more=st.integers(0, 1000))
def test_wilson_holds_the_share_and_is_symmetric(hits: int, more: int) -> None:
    low, high = wilson(hits, hits + more)
    assert 0 <= low <= high <= 1
    if hits + more:
        assert low - 1e-12 <= hits / (hits + more) <= high + 1e-12
    assert wilson(more, hits + more) == pytest.approx((1 - high, 1 - low))


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), max_size=30))
def test_effective_numbers_lie_between_one_and_the_number_of_groups(counts: list[int]) -> None:
    shannon, simpson = effective_number(counts)
    present = sum(count > 0 for count in counts)
    assert simpson <= shannon + 1e-9
    assert shannon <= present + 1e-9
    assert simpson >= min(present, 1) - 1e-9


def test_equal_groups_count_in_full_and_a_lone_giant_as_one() -> None:
    assert effective_number([50] * 7) == pytest.approx((7, 7))
    assert effective_number([1_000_000, 1]) == pytest.approx((1, 1), abs=1e-3)
    assert effective_number([]) == (0, 0)


def test_a_group_is_flagged_when_the_intervals_say_so_and_never_when_it_is_tiny() -> None:
    found = {
        group.value: group for group in groups_of({"a": (1000, 900), "b": (1000, 890), "c": (400, 200), "d": (9, 0)})
    }
    assert {value: group.flag for value, group in found.items()} == {"a": "more", "b": "more", "c": "fewer", "d": ""}
    assert found["c"].of_highest == pytest.approx(0.5 / 0.9)
    assert found["c"].ratio == pytest.approx(0.5 / (1990 / 2409))
    assert [value for value, group in found.items() if group.under_four_fifths] == ["c"]
    assert found["d"].of_highest is None
    assert sum(group.share for group in found.values()) == pytest.approx(1)
    even = groups_of({"a": (MIN_INPUTS, 20), "b": (MIN_INPUTS, 22), None: (500, 350)})
    assert [group.flag for group in even] == ["", "", ""]
    assert even[-1].value is None


def test_a_planted_word_is_found_and_chance_is_not() -> None:
    rng = random.Random(5)  # noqa: S311 - a test's own draws
    vocabulary = [f"word{number}" for number in range(300)] + ["apron"]
    meetings = Meetings(tuple(vocabulary), {"who": ("he", "she", None)})
    for _ in range(3000):
        who = rng.choice(("he", "she", "a rare one"))
        caption = set(rng.sample(vocabulary[:300], 6))
        if rng.random() < {"he": 0.02, "she": 0.2, "a rare one": 0.1}[who]:
            caption.add("apron")
        meetings.add({"who": (who,)}, caption)
    meetings.add({}, {"apron"})
    met = meetings.counts("who")
    assert met.in_group.sum() == met.captions == 3000
    assert np.array_equal(met.together.sum(0), met.with_word)
    found, pairs = words_of(vocabulary, met.with_word, met.in_group, met.together, met.captions)
    assert pairs > 800
    assert [[word.word for word in often] for often, _ in found] == [[], ["apron"], []]
    assert [[word.word for word in seldom] for _, seldom in found] == [["apron"], [], []]
    (apron,) = found[1][0]
    assert apron.pmi_bits == pytest.approx(math.log2(apron.lift), abs=1e-3)
    assert apron.lift == pytest.approx(apron.together / apron.expected, rel=1e-2)


def test_a_word_that_never_meets_a_group_has_no_pmi() -> None:
    together = np.array([[60, 0], [0, 60]])
    found, _ = words_of(["cat", "dog"], np.array([60, 60]), np.array([60, 60]), together, 120)
    assert [(word.word, word.lift, word.pmi_bits) for word in found[0][1]] == [("dog", 0, None)]


def test_words_are_words() -> None:
    assert words_in("A cat's CAFÉ, 2 cats' x 猫が好き <b>http://a.b") == {"cat's", "café", "cats", "猫が好き", "http"}
    assert max(map(len, words_in("y" * 10_000))) == 40


def test_the_commonest_words_survive_a_vocabulary_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_TRACKED", 500)
    vocabulary = Vocabulary()
    for number in range(5000):
        vocabulary.add({f"once{number}", f"other{number}", f"common{number % 10}"})
    assert set(vocabulary.commonest()[:10]) == {f"common{number}" for number in range(10)}
    assert len(vocabulary.commonest()) <= 500


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("cat", ("cat",)),
        (True, ("true",)),
        (7, ("7",)),
        (["a", "b", "a", None, ""], ("a", "b")),
        (None, ()),
        ("", ()),
        ({"a": 1}, ()),
        ("x" * 500, ("x" * 80,)),
        ("a\x1b[31m", ("a\N{REPLACEMENT CHARACTER}[31m",)),
    ],
)
def test_values_are_short_and_printable(value: object, expected: tuple[str, ...]) -> None:
    assert values_of({"field": value}, "field") == expected


def test_fields_with_few_values_are_chosen_and_strangers_cannot_fill_the_memory() -> None:
    candidates = Candidates(())
    for number in range(2000):
        fields = {"colour": number % 4, "id": number, "caption": "a", "url": "b", "one": "same", f"new{number}": 1}
        fields |= {"half": number % 2} if number < 900 else {}
        candidates.add(fields, kept=number % 2 == 0)
    assert candidates.chosen() == ("colour",)
    assert len(candidates.names) <= 500
    assert len(candidates._counts) <= 500
    assert candidates.counts("colour") == {"0": (500, 500), "1": (500, 0), "2": (500, 500), "3": (500, 0)}
    assert candidates.without("colour") == (0, 0)


def test_an_asked_field_with_many_values_is_counted_whole() -> None:
    candidates = Candidates(("name",))
    for number in range(1000):
        candidates.add({"name": f"n{number % 200}"}, kept=True)
        candidates.add({}, kept=False)
    counts = candidates.counts("name")
    assert len(counts) == MOST_VALUES + 1
    assert counts[None] == (750, 750)
    assert candidates.without("name") == (1000, 0)
