"""Pictures unlike all others are found in sets of several kinds, whatever the order of the inputs."""

import hashlib
import importlib

import numpy as np
import pyarrow as pa
import pytest

from training.data.clean import CleanConfig, decide, outlier_scores
from training.data.clean.outliers import OutlierConfig, outlying

CONFIG = CleanConfig(outliers=OutlierConfig(enabled=True))


def table(count: int = 400, strange: int = 4) -> pa.Table:
    """Two kinds of pictures, each with a few ways to vary, and some of no kind; a copy of the first at the end."""
    rng = np.random.default_rng(0)
    kinds = np.abs(rng.normal(size=(2, 256)))[np.arange(count) % 2]
    ways = rng.normal(size=(count, 6)) @ rng.normal(0, 0.3, (6, 256))
    features = kinds + ways + rng.normal(0, 0.05, (count, 256))
    features[:strange] = np.abs(rng.normal(size=(strange, 256)))
    features = np.concatenate([features, features[:1]]).astype(np.float16)
    digests = [hashlib.sha256(vector.tobytes()).digest() for vector in features]
    return pa.table(
        {
            "number": pa.array(range(count + 1), pa.int64()),
            "source": pa.array([str(number) for number in range(count + 1)]),
            "sha256": pa.array(digests, pa.binary(32)),
            "caption": pa.array([str(number) for number in range(count + 1)]),
            "phash": pa.nulls(count + 1, pa.uint64()),
            "thumbnail": pa.nulls(count + 1, pa.binary()),
            "features": pa.array(list(features), pa.list_(pa.float16())),
        }
    )


def test_what_is_unlike_all_others_is_irrelevant() -> None:
    found = decide(table(), CONFIG)
    assert {number: finding.rule for number, finding in found.items()} == {
        **dict.fromkeys(range(4), "outlier"),
        400: "exact_duplicate",
    }
    scores = outlier_scores(table(), CONFIG)
    assert set(scores) == set(range(400))
    for number in range(4):
        assert found[number].threshold == 5.0
        assert found[number].value == scores[number] > 5.0
    assert sorted(scores.values())[-5] < 5.0
    assert set(decide(table(), CleanConfig())) == {400}


def test_scores_that_are_known_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = outlier_scores(table(), CONFIG)
    expected = decide(table(), CONFIG)
    monkeypatch.setattr(importlib.import_module("training.data.clean.decide"), "outlying", None)
    assert decide(table(), CONFIG, scores) == expected


def test_outliers_do_not_depend_on_the_order_of_rows() -> None:
    shuffled = table().take(np.random.default_rng(1).permutation(401))
    assert decide(shuffled, CONFIG) == decide(table(), CONFIG)


def test_a_higher_threshold_drops_fewer() -> None:
    loose = CleanConfig(outliers=OutlierConfig(enabled=True, max_deviations=1e6))
    assert set(decide(table(), loose)) == {400}


@pytest.mark.parametrize("count", [0, 1, 63])
def test_few_pictures_have_no_outliers(count: int) -> None:
    features = np.random.default_rng(0).normal(size=(count, 8))
    assert outlying(features, [bytes([at]) for at in range(count)], OutlierConfig()).tolist() == [0.0] * count


def test_equal_pictures_have_no_outliers() -> None:
    scores = outlying(np.ones((100, 8)), [bytes([at]) for at in range(100)], OutlierConfig())
    assert np.abs(scores).max() < 0.1
