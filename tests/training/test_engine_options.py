"""Optimizers, precisions, offload and uneven shares on DeepSpeed's engine, in real processes."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

Told = Mapping[str, Mapping[str, Any]]


@pytest.fixture(scope="module", params=["some", pytest.param("all", marks=pytest.mark.slow)])
def told(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest, warm: Any) -> Told:
    """One program runs every case."""
    folder = tmp_path_factory.mktemp("options")
    warm.run("option_ranks", folder, request.param)
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def of(told: Told, start: str, *parts: str) -> dict[str, Mapping[str, Any]]:
    """The cases whose name begins so and contains all of these."""
    found = {
        name: result for name, result in told.items() if name.startswith(start) and all(part in name for part in parts)
    }
    assert found
    return found


def test_every_case_goes_on_from_its_middle_bit_for_bit(told: Told) -> None:
    assert len(told) >= 25
    for name, result in told.items():
        assert result["loaded_differs"] == [], name
        assert result["resumed_differs"] == [], name


def test_weights_averages_and_optimizer_state_are_fp32_whatever_the_products_are(told: Told) -> None:
    assert {tuple(result["types"]) for result in told.values()} == {("torch.float32",)}


@pytest.mark.parametrize("kind", ["schedule_free", "muon", "adafactor"])
def test_an_optimizer_takes_the_same_steps_at_every_stage_and_world_size(told: Told, kind: str) -> None:
    plain = {name: result for name, result in of(told, kind).items() if "scales" not in name and "offload" not in name}
    first = plain[f"{kind}-world-1-zero-0-rows-8-"]["losses"]
    assert min(first) < first[0] - 1, "it trains"
    for name, result in plain.items():
        assert result["losses"] == pytest.approx(first, abs=2e-4), name


@pytest.mark.parametrize("kind", ["adamw", "schedule_free", "muon"])
def test_weights_with_rates_of_their_own_take_the_same_steps_at_every_stage(told: Told, kind: str) -> None:
    first, *others = [result["losses"] for result in of(told, kind, "-scales").values()]
    assert others
    for losses in others:
        assert losses == pytest.approx(first, abs=2e-4)
    if kind != "adamw":
        plain = told[f"{kind}-world-2-zero-0-rows-8-"]["losses"]
        assert first[0] == pytest.approx(plain[0], abs=1e-5)
        assert first[1:] != pytest.approx(plain[1:], abs=1e-3), "a smaller rate of one weight shows"


def test_muon_tells_how_many_matrices_it_has_made_orthogonal(told: Told) -> None:
    for name, result in of(told, "muon").items():
        assert result["metrics"] == {"muon_updates": 2 * 6}, name
        assert "optimizer.momentum" in result["groups"]
        assert "optimizer.exp_avg" in result["groups"], "the rest is AdamW's"


def test_fp16_is_near_fp32_and_tells_its_loss_scale(told: Told) -> None:
    expected = told["adamw-world-2-zero-2-offload-rows-8-"]["losses"]
    for name, result in of(told, "adamw", "fp16").items():
        assert result["losses"] == pytest.approx(expected, rel=2e-3), name
        assert result["losses"] != pytest.approx(expected, abs=1e-7), "it was fp16"
        assert result["metrics"]["loss_scale"] >= 1
        assert result["scalars"]["loss_scale"] == result["metrics"]["loss_scale"]


def test_state_in_the_nodes_memory_trains_as_on_the_device(told: Told) -> None:
    first, *others = [result["losses"] for result in of(told, "adamw", "-offload").values()]
    for losses in others:
        assert losses == pytest.approx(first, abs=2e-4)
    free = told["schedule_free-world-2-zero-1-rows-8-"]["losses"]
    assert told["schedule_free-world-2-zero-1-offload-rows-8-"]["losses"] == pytest.approx(free, abs=2e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_state_on_the_nodes_disk_trains_as_in_its_memory_bit_for_bit(told: Told, stage: int) -> None:
    in_memory, on_disk = (told[f"adamw-world-2-zero-{stage}-{place}-rows-8-"] for place in ("offload", "disk"))
    assert on_disk["losses"] == in_memory["losses"]
    assert on_disk["groups"] == in_memory["groups"]


def test_uneven_shares_and_rows_that_fill_up_do_not_count(told: Told) -> None:
    """Seven rows over two workers, whole or in micro-batches of three."""
    first, *others = [result["losses"] for result in of(told, "adamw", "-rows-7-").values()]
    assert len(others) == 3
    for losses in others:
        assert losses == pytest.approx(first, abs=2e-4)
