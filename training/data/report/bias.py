"""The bias audit: how groups are spread, what their captions say, and how many of each cleaning keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

FOUR_FIFTHS = 0.8
"""Under this part of the highest group's share, US rules on selection look for adverse impact (29 CFR 1607.4(D))."""
MIN_INPUTS = 30
"""Inputs that a group needs to be compared by its share kept."""
MIN_WORD = 10
"""Kept captions that must hold a word before it is paired with groups."""
MIN_EXPECTED = 5.0
"""Captions of a group that chance alone would have to give a word: fewer make the test unreliable."""
ERROR_RATE = 0.05
"""The chance that anything is flagged, or any word shown, though all is chance: of one field's groups, or its pairs."""
WORDS_SHOWN = 6


@dataclass(frozen=True)
class Word:
    """A word that a group's captions hold more or less often than all captions do.

    Attributes:
        word: in small letters.
        together: kept pictures of the group with the word in their caption.
        expected: how many chance would give.
        lift: ``together / expected``; 1 is chance.
        pmi_bits: pointwise mutual information, ``log2(lift)``; None where the two never meet.
    """

    word: str
    together: int
    expected: float
    lift: float
    pmi_bits: float | None


@dataclass(frozen=True)
class Group:
    """The inputs that have one value of a field.

    Attributes:
        value: the value; ``None`` gathers values too rare to be named.
        inputs: with this value, of those whose fields could be read.
        kept: of these.
        share: of all kept pictures that have the field.
        kept_share: ``kept / inputs``.
        kept_low: lower end of its Wilson 95 % interval.
        kept_high: upper end.
        ratio: ``kept_share`` over that of all inputs with the field.
        of_highest: ``kept_share`` over that of the group with the highest; None where there are too few inputs.
        flag: ``fewer`` or ``more`` are kept than of all others together, and the two intervals do not meet, widened for
            the number of groups (Bonferroni).
        under_four_fifths: the flag is ``fewer`` and ``of_highest`` is under 0.8.
        often: words of its captions, the most unexpected first.
        seldom: words that its captions miss.
    """

    value: str | None
    inputs: int
    kept: int
    share: float
    kept_share: float
    kept_low: float
    kept_high: float
    ratio: float
    of_highest: float | None
    flag: Literal["", "fewer", "more"]
    under_four_fifths: bool
    often: tuple[Word, ...] = ()
    seldom: tuple[Word, ...] = ()


@dataclass(frozen=True)
class FieldAudit:
    """One metadata field.

    Attributes:
        field: its name.
        several: a picture may have several values, and counts in each group.
        groups: the commonest first.
        without: inputs whose fields could be read, without a value.
        without_kept: of these.
        effective: effective number of groups among kept pictures: exp of the Shannon entropy (Hill 1973, order 1).
        simpson: the same by Simpson's index, 1 / sum of squared shares (order 2): the large groups count more.
        pairs_tested: pairs of word and group that had the minimum counts.
    """

    field: str
    several: bool
    groups: tuple[Group, ...]
    without: int
    without_kept: int
    effective: float
    simpson: float
    pairs_tested: int


def wilson(hits: int, count: int, error_rate: float = 0.05) -> tuple[float, float]:
    """The interval of a share (Wilson 1927), 95 % unless told otherwise; all of 0..1 where nothing was counted."""
    if not count:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(1 - error_rate / 2)
    share, z2 = hits / count, z * z / count
    centre = (share + z2 / 2) / (1 + z2)
    half = z / (1 + z2) * math.sqrt(share * (1 - share) / count + z2 / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def effective_number(counts: Sequence[int]) -> tuple[float, float]:
    """Effective number of classes by Shannon and by Simpson; equal counts give their number, nothing gives 0."""
    total = sum(counts)
    if not total:
        return 0.0, 0.0
    shares = [count / total for count in counts if count]
    return math.exp(-sum(share * math.log(share) for share in shares)), 1 / sum(share * share for share in shares)


def groups_of(counts: dict[str | None, tuple[int, int]]) -> tuple[Group, ...]:
    """The shares of groups, without their words.

    Args:
        counts: inputs and kept by value; None gathers the rare values and comes last.
    """
    total = sum(inputs for inputs, _ in counts.values()), sum(kept for _, kept in counts.values())
    compared = [kept / inputs for inputs, kept in counts.values() if inputs >= MIN_INPUTS]
    highest = max(compared, default=0.0)
    ranked = sorted(counts.items(), key=lambda item: (item[0] is None, -item[1][0], item[0] or ""))
    return tuple(_group(value, count, total, highest, len(counts)) for value, count in ranked)


def _group(value: str | None, count: tuple[int, int], total: tuple[int, int], highest: float, groups: int) -> Group:
    inputs, kept = count
    all_inputs, all_kept = total
    overall = all_kept / all_inputs if all_inputs else 0.0
    share = kept / inputs if inputs else 0.0
    low, high = wilson(kept, inputs)
    enough = inputs >= MIN_INPUTS and all_inputs - inputs >= MIN_INPUTS
    flag: Literal["", "fewer", "more"] = ""
    if enough:
        wide_low, wide_high = wilson(kept, inputs, ERROR_RATE / groups)
        other_low, other_high = wilson(all_kept - kept, all_inputs - inputs, ERROR_RATE / groups)
        flag = "fewer" if wide_high < other_low else "more" if wide_low > other_high else ""
    of_highest = share / highest if inputs >= MIN_INPUTS and highest else None
    return Group(
        value=value,
        inputs=inputs,
        kept=kept,
        share=kept / all_kept if all_kept else 0.0,
        kept_share=share,
        kept_low=low,
        kept_high=high,
        ratio=share / overall if overall else 0.0,
        of_highest=of_highest,
        flag=flag,
        under_four_fifths=flag == "fewer" and of_highest is not None and of_highest < FOUR_FIFTHS,
    )


def words_of(
    words: Sequence[str], with_word: np.ndarray, in_group: np.ndarray, together: np.ndarray, captions: int
) -> tuple[list[tuple[tuple[Word, ...], tuple[Word, ...]]], int]:
    """The words that each group's captions hold more, and less, often than chance.

    A pair is shown if its log-likelihood ratio (Dunning 1993) is significant at ``ERROR_RATE`` over all pairs tested.

    Args:
        words: the vocabulary.
        with_word: captions with each word, ``[words]``.
        in_group: captions of each group, ``[groups]``.
        together: captions of a group with a word, ``[groups, words]``.
        captions: in all.

    Returns:
        For each group (more often, less often), and the number of pairs that had the minimum counts.
    """
    if not captions or not words:
        return [((), ())] * len(in_group), 0
    expected = np.outer(in_group, with_word) / captions
    tested = (expected >= MIN_EXPECTED) & (with_word >= MIN_WORD) & (with_word < captions)
    tested &= (in_group < captions)[:, None]
    pairs = int(tested.sum())
    sure = tested & (_p_value(together, with_word, in_group, captions) * pairs < ERROR_RATE)
    found = []
    for group, row in enumerate(sure):
        picked = [
            _word(words[i], int(together[group, i]), float(expected[group, i])) for i in np.flatnonzero(row).tolist()
        ]
        often = sorted((w for w in picked if w.lift > 1), key=lambda w: (-w.lift, -w.together, w.word))
        seldom = sorted((w for w in picked if w.lift < 1), key=lambda w: (w.lift, -w.expected, w.word))
        found.append((tuple(often[:WORDS_SHOWN]), tuple(seldom[:WORDS_SHOWN])))
    return found, pairs


def _word(word: str, together: int, expected: float) -> Word:
    lift = together / expected
    return Word(word, together, round(expected, 2), round(lift, 4), round(math.log2(lift), 4) if lift else None)


def _p_value(together: np.ndarray, with_word: np.ndarray, in_group: np.ndarray, captions: int) -> np.ndarray:
    """The chance of so large a G statistic, one degree of freedom: ``erfc(sqrt(G / 2))``; 1 where a table is empty."""
    row, column = in_group[:, None].astype(float), with_word[None, :].astype(float)
    cells = (together, row - together, column - together, captions - row - column + together)
    margins = (
        row * column,
        row * (captions - column),
        (captions - row) * column,
        (captions - row) * (captions - column),
    )
    total = np.zeros(together.shape)
    for seen, margin in zip(cells, margins, strict=True):
        with np.errstate(divide="ignore", invalid="ignore"):
            term = seen * np.log(seen * captions / margin)
        total += np.where(np.isfinite(term), term, 0.0)
    roots = np.sqrt(np.maximum(total, 0.0))
    values = [math.erfc(root) for root in roots.ravel().tolist()]
    return np.array(values).reshape(roots.shape)
