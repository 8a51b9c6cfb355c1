"""States go from every world to every other, however they are cut, bit for bit; and what one rank suffers, all hear."""

import json
from typing import Any

import pytest

WORLDS = (1, 2, 4)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, warm: Any) -> dict[str, Any]:
    """What the ranks of all worlds have found wrong."""
    out = tmp_path_factory.mktemp("worlds")
    warm.run("checkpoint.state_ranks", out)
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*_round-*.json")}


@pytest.mark.parametrize("world", WORLDS)
def test_what_was_kept_comes_back_bit_for_bit_and_a_failing_rank_is_heard_by_all(
    told: dict[str, Any], world: int
) -> None:
    ranks = told[f"first_round-{world}"]
    assert len(ranks) == world
    for wrong in ranks:
        assert len(wrong) == 3 * 4 + 1
        assert {name: found for name, found in wrong.items() if found} == {}


@pytest.mark.parametrize("world", WORLDS)
def test_every_world_loads_what_every_other_has_saved(told: dict[str, Any], world: int) -> None:
    ranks = told[f"second_round-{world}"]
    assert len(ranks) == world
    for wrong in ranks:
        assert len(wrong) == 3 * 3 * 3
        assert {name: found for name, found in wrong.items() if found} == {}
