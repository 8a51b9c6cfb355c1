"""What does not work together is refused as a recipe is read, with what would work."""

from typing import Any

import pytest

from training.config import parse
from training.errors import ConfigError

SCHEDULE_FREE = {"optimizer": {"kind": "schedule_free"}, "schedule": {"kind": "constant"}}


def recipe(**sections: Any) -> dict[str, Any]:
    return {"data": {"path": "anywhere"}, **sections}


@pytest.mark.parametrize(
    ("sections", "why", "instead"),
    [
        ({"engine": {"zero_stage": 0, "offload": "cpu"}}, "at engine.zero_stage 0", "zero_stage 1, 2 or 3"),
        ({"engine": {"zero_stage": 1, "offload": "nvme"}}, "needs a folder on a local disk", "offload_path, or"),
        ({"engine": {"offload_path": "/disk"}}, "where nothing would be put", "engine.offload nvme"),
        ({"engine": {"zero_stage": 1}, "optimizer": {"kind": "adafactor"}}, "whole matrices", "zero_stage 0, or"),
        ({"engine": {"offload": "cpu"}, "optimizer": {"kind": "muon"}}, "keeps them off it", "kind adamw"),
        ({"optimizer": {"kind": "schedule_free"}}, "no use for a rate that falls", "schedule.kind constant"),
        ({**SCHEDULE_FREE, "ema": {"post_hoc": {}}}, "averages the weights itself", "no ema.post_hoc"),
        ({"ema": {"publish_length": 0.1}}, "needs the snapshots", "ema.post_hoc: {}"),
        ({"engine": {"precision": "fp8", "zero_stage": 3}}, "takes them apart", "precision bf16"),
        ({"engine": {"compile": "whole", "zero_stage": 3}}, "cannot see through", "compile blocks or none"),
    ],
)
def test_what_does_not_work_is_refused_with_what_would(sections: dict[str, Any], why: str, instead: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(recipe(**sections))
    text = str(refused.value)
    assert why in text
    assert instead in text.partition("what works: ")[2]


@pytest.mark.parametrize(
    "sections",
    [{"engine": {"zero_stage": stage, "offload": "cpu"}} for stage in (1, 2, 3)]
    + [
        {"engine": {"zero_stage": 0}, "optimizer": {"kind": "adafactor"}},
        {"engine": {"zero_stage": 3}, "optimizer": {"kind": "muon"}},
        {"engine": {"zero_stage": 3, "compile": "blocks"}},
        {"engine": {"zero_stage": 2, "offload": "cpu"}, **SCHEDULE_FREE},
        {"engine": {"zero_stage": 3, "offload": "nvme", "offload_path": "/disk"}},
        {"ema": {"post_hoc": {"lengths": [0.1]}, "publish_length": 0.12}},
    ],
)
def test_what_works_is_taken(sections: dict[str, Any]) -> None:
    parse(recipe(**sections))


@pytest.mark.parametrize("length", [0, 0.28, -1])
def test_an_average_of_an_impossible_length_is_refused(length: float) -> None:
    with pytest.raises(ConfigError, match="ema"):
        parse(recipe(ema={"post_hoc": {"lengths": [length]}}))
