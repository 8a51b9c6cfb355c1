"""Quotas: token buckets that fill evenly, also where several replicas count in one folder."""

from __future__ import annotations

import asyncio
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serving.errors import JobsFullError, QuotaError, WorkLimitError
from serving.keys import ApiKey, Quota
from serving.quotas import Cost, Ledger, duration


class Clock:
    now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


def key(**quota: float) -> ApiKey:
    created = "2026-01-01T00:00:00+00:00"
    return ApiKey(name="studio", sha256="a" * 64, created_utc=created, quota=Quota.model_validate(quota))


def spend(ledger: Ledger, owner: ApiKey, images: int, work: float = 0.0) -> dict[str, str]:
    standings = asyncio.run(ledger.spend(owner, Cost(images, work)))
    return {name: value for standing in standings for name, value in standing.headers.items()}


@pytest.mark.parametrize("shared", [False, True])
def test_a_bucket_is_full_at_first_and_fills_evenly(shared: bool, tmp_path: Path) -> None:
    clock = Clock()
    ledger = Ledger(tmp_path if shared else None, clock)
    owner = key(images_per_minute=6)
    assert spend(ledger, owner, 6) == {
        "x-ratelimit-limit-images": "6",
        "x-ratelimit-remaining-images": "0",
        "x-ratelimit-reset-images": "1m0s",
    }
    with pytest.raises(QuotaError) as caught:
        spend(ledger, owner, 2)
    assert caught.value.wait_s == pytest.approx(20)
    assert str(caught.value) == (
        "This API key's quota is used up.\n"
        "  value:   '2 images wanted, 0 left'\n"
        "  rule:    at most 6 images in 60 s\n"
        "  mend:    ask again in 20 s"
    )
    clock.now_s += 20
    assert spend(ledger, owner, 2)["x-ratelimit-remaining-images"] == "0"
    clock.now_s += 1_000_000
    assert spend(ledger, owner, 1)["x-ratelimit-remaining-images"] == "5"


def test_more_than_a_window_has_can_never_be_had() -> None:
    with pytest.raises(QuotaError) as caught:
        spend(Ledger(), key(images_per_day=3), 4)
    assert caught.value.wait_s is None
    assert str(caught.value) == (
        "This API key's quota is too small for this.\n"
        "  value:   '4 images wanted, 3 left'\n"
        "  rule:    at most 3 images in 86400 s\n"
        "  mend:    ask for less at once"
    )


def test_what_one_window_refuses_no_other_pays_for() -> None:
    clock = Clock()
    ledger, owner = Ledger(clock=clock), key(images_per_minute=10, megapixel_steps_per_day=5)
    spend(ledger, owner, 1, 4)
    with pytest.raises(QuotaError, match="megapixel-steps"):
        spend(ledger, owner, 1, 4)
    assert spend(ledger, owner, 1, 1)["x-ratelimit-remaining-images"] == "8"


def test_what_is_given_back_can_be_spent_again_and_never_more() -> None:
    ledger, owner = Ledger(clock=Clock()), key(images_per_minute=4)
    spend(ledger, owner, 3)
    for _ in range(3):
        asyncio.run(ledger.give_back(owner, Cost(3, 0)))
    assert spend(ledger, owner, 4)["x-ratelimit-remaining-images"] == "0"


def test_replicas_that_count_in_one_folder_give_out_no_more_than_there_is(tmp_path: Path) -> None:
    clock, owner = Clock(), key(images_per_minute=10)

    def ask(number: int) -> bool:
        try:
            spend(Ledger(tmp_path, clock), owner, 1)
        except QuotaError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(40))) == 10
    (tmp_path / "studio.json").write_text('{"images": [')
    assert spend(Ledger(tmp_path, clock), owner, 1)["x-ratelimit-remaining-images"] == "9", "damaged: it starts anew"
    assert json.loads((tmp_path / "studio.json").read_text()) == {"images": [9.0, clock.now_s]}


def test_a_key_without_a_quota_is_not_counted(tmp_path: Path) -> None:
    assert spend(Ledger(tmp_path / "none"), key(), 1_000_000) == {}
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.12, "120ms"), (59.6, "1m0s"), (360, "6m0s"), (86_344, "23h59m4s"), (3600, "1h0m0s")],
)
def test_durations_are_spelt_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    "error", [QuotaError("images", 2, 1, 3, 60, 20.0), WorkLimitError(1, 2, 3, 4), JobsFullError(2, 1)], ids=repr
)
def test_refusals_cross_processes(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
