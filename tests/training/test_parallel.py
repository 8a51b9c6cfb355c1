"""DeepSpeed's engine in real processes: every ZeRO stage, world size and accumulation trains as plain AdamW does."""

import importlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

STAGES, WORLDS, MICRO_BATCHES, MIDDLE = (0, 1, 2, 3), (1, 2), (None, 2), 4
SOURCES = ((2, 2), (1, 3), (1, 0), (2, 3))
GROUPS = ("weights", "ema", "optimizer.exp_avg", "optimizer.exp_avg_sq")

GOLDEN = [10.598374, 7.254106, 7.438076, 5.258777, 7.569278, 9.269854, 6.259105, 8.268643]
"""The losses of the tiny network; a change means that every run trains differently."""

WEIGHTS_TOLERANCE = 5e-5
"""Adam divides by the root of what may be almost nothing: rounding of 1e-8 in a gradient grows."""

EVERYWHERE = [(world, stage, micro) for world in WORLDS for stage in STAGES for micro in MICRO_BATCHES]
everywhere = pytest.mark.parametrize(("world", "stage", "micro"), EVERYWHERE)
Tensors = Mapping[str, torch.Tensor]


class Kept:
    """What the processes left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def tensors(self, name: str, group: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}.{group}.safetensors")

    def told(self, name: str, what: str = "told") -> Any:
        return json.loads((self.folder / f"{name}.{what}.json").read_text())


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory, warm: Any) -> Iterator[Kept]:
    """One program runs every combination."""
    folder = tmp_path_factory.mktemp("engines")
    warm.run("engine_ranks", folder)
    yield Kept(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def ranks() -> ModuleType:
    """The program as a module: the network and its batches."""
    return importlib.import_module("tests.training.engine_ranks")


@pytest.fixture(scope="module")
def reference(ranks: ModuleType) -> tuple[list[list[float]], Tensors, Tensors]:
    """Plain torch on the whole batch: losses with norms, the weights at the end and their average."""
    module = ranks.Probe()
    optimizer = torch.optim.AdamW(
        module.parameters(), betas=(0.9, 0.99), eps=1e-8, weight_decay=ranks.OPTIMIZER.weight_decay, foreach=False
    )
    average = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    told = []
    for step in range(ranks.STEPS):
        for group in optimizer.param_groups:
            group["lr"] = ranks.rate(step)
        optimizer.zero_grad()
        loss = module(ranks.batch(step))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), ranks.CLIP)
        optimizer.step()
        told.append([loss.item(), norm.item()])
        for name, parameter in module.named_parameters():
            decay = ranks.EMA.decay_at(step)
            average[name] = decay * average[name] + (1 - decay) * parameter.detach()
    return told, {name: parameter.detach() for name, parameter in module.named_parameters()}, average


def case(world: int, stage: int, micro: int | None, precision: str = "fp32") -> str:
    return f"world-{world}-zero-{stage}-micro-{micro}-{precision}"


def furthest(found: Tensors, expected: Tensors) -> float:
    """The largest difference of any number; the names must agree."""
    assert found.keys() == expected.keys()
    assert all(found[name].shape == tensor.shape for name, tensor in expected.items())
    return max(float((found[name].double() - tensor.double()).abs().max()) for name, tensor in expected.items())


def bit_equal(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_losses_are_these(reference: tuple[list[list[float]], Tensors, Tensors]) -> None:
    told, _, _ = reference
    assert [loss for loss, _ in told] == pytest.approx(GOLDEN, rel=1e-5, abs=1e-4)
    assert {norm > 1 for _, norm in told} == {True, False}, "some gradients are clipped and some are not"


@everywhere
def test_losses_norms_and_weights_are_plain_adamws(
    kept: Kept, reference: Any, world: int, stage: int, micro: int | None
) -> None:
    """Clipping, weight decay, accumulation, sharding and the sum over workers included."""
    expected, weights, _ = reference
    told = kept.told(case(world, stage, micro))
    assert [loss for loss, _ in told] == pytest.approx([loss for loss, _ in expected], abs=1e-5)
    assert [norm for _, norm in told] == pytest.approx([norm for _, norm in expected], abs=1e-5)
    end = kept.tensors(case(world, stage, micro), "end_weights")
    assert furthest(end, weights) < WEIGHTS_TOLERANCE
    assert all(tensor.dtype == torch.float32 for tensor in end.values())
    assert furthest(end, kept.tensors(case(world, stage, micro), "middle_weights")) > 1e-3, "it trained"


@everywhere
def test_the_average_is_the_same_average(kept: Kept, reference: Any, world: int, stage: int, micro: int | None) -> None:
    """Each rank averages its own part, and the parts make a whole."""
    _, weights, average = reference
    name = case(world, stage, micro)
    for group in ("middle_ema", "end_ema"):
        assert furthest(kept.tensors(name, group), kept.tensors(case(1, 0, None), group)) < WEIGHTS_TOLERANCE
    assert furthest(kept.tensors(name, "end_ema"), average) < WEIGHTS_TOLERANCE
    assert furthest(kept.tensors(name, "end_ema"), weights) > 5e-4, "an average, not the weights"


@everywhere
def test_a_resumed_engine_goes_on_bit_for_bit(kept: Kept, world: int, stage: int, micro: int | None) -> None:
    name = case(world, stage, micro)
    for group in GROUPS:
        assert bit_equal(kept.tensors(name, f"loaded_{group}"), kept.tensors(name, f"middle_{group}")), group
        assert bit_equal(kept.tensors(name, f"resumed_{group}"), kept.tensors(name, f"end_{group}")), group
    assert kept.told(name, "loaded_scalars") == kept.told(name, "middle_scalars")
    assert kept.told(name, "replicas_differ") == [0], "what every rank holds whole is the same, bit for bit"


@pytest.mark.parametrize(("world", "stage"), [(world, stage) for world in WORLDS for stage in STAGES])
@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_a_state_goes_on_at_any_other_stage_and_world_size(
    kept: Kept, source: tuple[int, int], world: int, stage: int
) -> None:
    before, after = case(*source, None), f"{case(*source, None)}-into-{case(world, stage, 2)}"
    for group in GROUPS:
        assert bit_equal(kept.tensors(after, f"loaded_{group}"), kept.tensors(before, f"middle_{group}")), group
    told = [loss for loss, _ in kept.told(after)]
    assert told == pytest.approx([loss for loss, _ in kept.told(before)[MIDDLE:]], abs=1e-5)
    assert furthest(kept.tensors(after, "end_weights"), kept.tensors(before, "end_weights")) < WEIGHTS_TOLERANCE


def test_the_state_is_whole_and_named(kept: Kept, ranks: ModuleType) -> None:
    shapes = {name: parameter.shape for name, parameter in ranks.Probe().named_parameters()}
    for world, stage, micro in EVERYWHERE:
        name = case(world, stage, micro)
        assert kept.told(name, "middle_scalars") == [{"optimizer.0.step": MIDDLE}]
        for group in GROUPS:
            found = kept.tensors(name, f"middle_{group}")
            assert {name: tensor.shape for name, tensor in found.items()} == shapes
            assert furthest(found, kept.tensors(case(1, 0, None), f"middle_{group}")) < WEIGHTS_TOLERANCE


@pytest.mark.parametrize("world", WORLDS)
def test_bf16_is_close_resumes_exactly_and_keeps_fp32_weights(kept: Kept, reference: Any, world: int) -> None:
    name = case(world, 1, 2, "bf16")
    expected, told = [loss for loss, _ in reference[0]], [loss for loss, _ in kept.told(name)]
    assert told == pytest.approx(expected, rel=2e-2)
    assert told != pytest.approx(expected, abs=1e-5), "it was bf16"
    end = kept.tensors(name, "end_weights")
    assert all(tensor.dtype == torch.float32 for tensor in end.values())
    assert not bit_equal({k: v.bfloat16().float() for k, v in end.items()}, end), "not rounded to bf16"
    assert bit_equal(kept.tensors(name, "resumed_weights"), end)


@pytest.mark.parametrize("world", WORLDS)
def test_another_networks_state_is_refused_by_name_and_leaves_the_weights(kept: Kept, world: int) -> None:
    texts = kept.told(f"world-{world}", "refusals")
    assert len(texts) == 6 * len(STAGES)
    for stage in STAGES:
        missing, surplus, shape, bare, uncounted, untouched = texts[6 * stage : 6 * stage + 6]
        assert "another network" in missing
        assert "'layers.5.bias'" in missing
        assert "'layers.9.weight'" in surplus
        assert "layers.5.weight has another shape" in shape
        assert "(8, 320)" in shape
        assert "(7, 320)" in shape
        assert "another optimizer" in bare
        assert "'optimizer.exp_avg'" in bare
        assert "another optimizer" in uncounted
        assert "'optimizer.0.step'" in uncounted
        assert untouched == "untouched: True"


@pytest.mark.parametrize("world", WORLDS)
def test_rows_are_shared_and_every_rank_gets_them_all(kept: Kept, world: int) -> None:
    everyone = kept.told(f"world-{world}", "rows")
    expected = {str(rows): [[float(row**2), float(-row)] for row in range(rows)] for rows in (1, 2, 5)}
    for number, (seen, results) in enumerate(everyone):
        assert results == expected
        shares = [list(range(number, rows, world)) for rows in (1, 2, 5)]
        assert seen == [share for share in shares if share]


@pytest.mark.parametrize("world", WORLDS)
def test_all_ranks_hear_what_came_of_an_action_and_none_waits_for_one_that_failed(kept: Kept, world: int) -> None:
    everyone = kept.told(f"world-{world}", "decisions")
    for number, got in enumerate(everyone):
        assert got["rank 0's"] == {"rank": 0}
        assert got["each its own"] == number
        assert got["total"] == [world, sum(range(world))]
        assert got["typed"] == "UsageError: no"
        error = "OSError: [Errno 28] No space left on device"
        assert got["untyped"] == (error if number == 0 else f"TrainingError: Rank 0 failed: {error}")
        assert got["the last rank"] == "UsageError: of the last"


@pytest.mark.parametrize(
    ("visible", "local_rank", "expected"),
    [(0, 1, "cpu"), (1, 0, "cuda:0"), (1, 3, "cuda:0"), (4, 3, "cuda:3"), (2, 1, "cuda:1")],
)
def test_each_process_of_a_node_has_a_gpu_that_it_can_see(
    monkeypatch: pytest.MonkeyPatch, visible: int, local_rank: int, expected: str
) -> None:
    from training.parallel import local_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert str(local_device(local_rank)) == expected
