"""What a recipe takes is known before it runs; what cannot fit is refused with what would."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from training import device, flops, footprint, forecast, memory_forecast
from training.config import TrainConfig, parse
from training.data.batch import Batch
from training.errors import ConfigError, TrainingError
from training.footprint import Footprint
from training.memory_forecast import Device
from training.out_of_memory import SaysWhatFits
from training.step import ObjectiveLoss
from training.stopwatch import Stopwatch

TINY = {"resolution": 8, "widths": [8, 16], "attention": [False, True], "head_width": 8, "norm_groups": 4}
GIB = 1024**3


def recipe(**sections: Any) -> TrainConfig:
    return parse({"data": {"path": ""}, "model": TINY, "global_batch": 8, "steps": 10, **sections})


@pytest.fixture(scope="module")
def tiny() -> Footprint:
    config = recipe()
    return footprint.measure(config, forecast.told_shape(config), "fp32")


def test_parameters_are_those_of_the_real_network_and_nothing_is_allocated(tiny: Footprint) -> None:
    config = recipe()
    network = config.model.build(forecast.told_shape(config))
    assert tiny.parameters == tiny.trained == sum(each.numel() for each in network.parameters())
    huge = recipe(model={**TINY, "resolution": 512, "widths": [1024, 2048]})
    found = footprint.measure(huge, forecast.told_shape(huge), "fp32")
    assert found.activation_bytes(64) > 100 * GIB


def test_a_linear_layer_counts_as_the_formula_says() -> None:
    """Two FLOPs for each weight and row forwards, and twice as many backwards (Chowdhery et al. 2022, appendix B)."""
    layer = torch.nn.Linear(64, 32, bias=False, device="meta")
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        layer(torch.zeros(5, 64, device="meta", requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 5 * 64 * 32


def test_activations_grow_with_the_rows_and_shrink_with_checkpointing(tiny: Footprint) -> None:
    config = recipe()
    assert tiny.activation_bytes(16) - tiny.activation_bytes(8) == 8 * tiny.row_bytes > 0
    told = forecast.told_shape(config)
    assert footprint.measure(config, told, "bf16").fixed_bytes > 1.9 * tiny.parameters, "autocast's copies of weights"
    lean = footprint.measure(recipe(engine={"gradient_checkpointing": True}), told, "fp32")
    assert lean.row_bytes < tiny.row_bytes
    assert lean.flops_per_image == tiny.flops_per_image, "what is computed again does not count"


def test_zero_shares_what_its_stage_says(tiny: Footprint) -> None:
    on, four = Device("CPU", None, None, 0), 4 * tiny.parameters

    def parts(stage: int) -> Any:
        return memory_forecast.forecast(recipe(engine={"zero_stage": stage}), tiny, 4, on).parts

    assert (parts(0)["weights"], parts(0)["gradients"], parts(0)["optimizer"]) == (four, four, 2 * four)
    assert (parts(1)["weights"], parts(1)["gradients"], parts(1)["optimizer"]) == (four, four, 2 * four // 4)
    assert (parts(2)["gradients"], parts(3)["weights"]) == (four // 4, four // 4)
    assert "master weights" not in parts(0)
    alone = memory_forecast.forecast(recipe(engine={"zero_stage": 1}), tiny, 1, on).parts
    assert "master weights" not in alone, "one worker trains as stage 0 does"
    gpu = Device("H100", None, None, 0)
    moved = recipe(engine={"zero_stage": 1, "offload": "cpu"}, workers={"gpus": 1})
    assert "optimizer" not in memory_forecast.forecast(moved, tiny, 4, gpu).parts
    disk = recipe(engine={"zero_stage": 1, "offload": "nvme", "offload_path": "/disk"})
    assert not {"optimizer", "master weights", "node memory"} & set(memory_forecast.forecast(disk, tiny, 4, on).parts)


@pytest.mark.parametrize("kind", ["adamw", "schedule_free", "adafactor", "muon"])
def test_the_optimizers_memory_is_that_of_its_real_state(kind: str) -> None:
    fitting = {"schedule": {"kind": "constant"}, "engine": {"zero_stage": 0}}
    config = recipe(optimizer={"kind": kind}, **fitting)
    told = forecast.told_shape(config)
    module = ObjectiveLoss(config.model.build(told), config.objective)
    weights = dict(module.named_parameters())
    optimizer = config.optimizer.build(weights.items(), {})
    found = 0
    for group in optimizer.param_groups:
        for weight in group["params"]:
            state = config.optimizer.fresh(weight, group)
            found += sum(values.numel() for slot, values in state.items() if slot != "step")
    measured = footprint.measure(config, told, "fp32")
    assert measured.optimizer == found > 0
    assert memory_forecast.forecast(config, measured, 1, Device("CPU", None, None, 0)).parts["optimizer"] == 4 * found
    per_weight = found / measured.trained
    assert {"adamw": per_weight == 2, "schedule_free": per_weight == 2, "adafactor": per_weight < 1}.get(
        kind, 1 < per_weight < 2
    )


def test_every_tracked_average_is_counted_where_it_lies(tiny: Footprint) -> None:
    def parts(**sections: Any) -> Any:
        return memory_forecast.forecast(recipe(**sections), tiny, 2, Device("CPU", None, None, 0)).parts

    plain, tracked = parts(), parts(ema={"post_hoc": {"lengths": [0.05, 0.1]}})
    assert (plain["averages"], tracked["averages"]) == (4 * tiny.trained // 2, 3 * 4 * tiny.trained // 2)
    assert tracked["node memory"] - plain["node memory"] == 3 * 2 * 4 * tiny.trained // 2, "three states on the node"
    assert "node memory" not in parts(checkpoint={"memory_every_steps": 0})
    gpu = Device("H100", None, None, 0)
    moved = recipe(engine={"zero_stage": 1, "offload": "cpu"}, workers={"gpus": 1})
    assert "averages" not in memory_forecast.forecast(moved, tiny, 2, gpu).parts, "beside the weights that it averages"


def test_what_cannot_fit_is_refused_with_what_would(tiny: Footprint) -> None:
    config = recipe(global_batch=1024)
    told = forecast.told_shape(config)
    room = tiny.activation_bytes(300) + 8 * 4 * tiny.parameters
    with pytest.raises(ConfigError, match=r"does not fit: a worker would need") as raised:
        memory_forecast.require_room(
            config, tiny, 1, Device("CPU", room, None, 0), lambda other: footprint.measure(other, told, "fp32")
        )
    error = raised.value
    assert error.exit_code == 2
    assert "1024 rows of a micro-batch" in str(error.value)
    assert "activations" in str(error.value)
    assert error.options[0] == "engine.micro_batch=256"
    assert any("engine.gradient_checkpointing=true" in option for option in error.options)
    its = {
        lean: footprint.measure(recipe(engine={"gradient_checkpointing": lean}), told, "fp32") for lean in (True, False)
    }
    for option in error.options:
        fields = dict(word.removeprefix("engine.").split("=") for word in option.split())
        changed = recipe(global_batch=1024, engine={key: json.loads(value) for key, value in fields.items()})
        found = its[changed.engine.gradient_checkpointing]
        assert memory_forecast.forecast(changed, found, 1, Device("CPU", room, None, 0)).total_bytes <= room


def test_a_model_that_never_fits_is_told_so(tiny: Footprint) -> None:
    with pytest.raises(ConfigError, match=r"a smaller model: this one takes \d+\.\d\d GiB at the least"):
        memory_forecast.require_room(recipe(), tiny, 1, Device("CPU", 1000, None, 0), lambda _: tiny)


def test_time_and_money_follow_from_the_rate_of_an_earlier_run(tmp_path: Path) -> None:
    config = recipe(
        steps=3600, workers={"count": 2, "cpus": 0.5}, cost={"per_cpu_hour": 0.1, "currency": "USD"}, engine={}
    )
    on = Device("CPU", None, 1e12, GIB)
    assumed = forecast.make(config, on, "fp32", tmp_path)
    share = forecast.ASSUMED_MFU[False]
    assert assumed.images_per_s == pytest.approx(2 * share * 1e12 / assumed.flops_per_image)
    assert assumed.rate_from == "an assumed MFU of 25%"
    measured = forecast.Actual(assumed.key, images_per_s=8.0, memory_bytes=1, seconds=10, energy_kwh=0.8, images=80)
    forecast.write(tmp_path / "earlier" / forecast.ACTUAL, measured)
    known = forecast.make(config, on, "fp32", tmp_path)
    assert (known.images_per_s, known.seconds, known.cpu_hours) == (8.0, 3600, 1.0)
    assert known.money == pytest.approx(0.1)
    assert known.currency == "USD"
    assert known.energy_kwh == pytest.approx(0.01 * 3600 * 8)
    other = config.model_copy(update={"global_batch": 16})
    assert forecast.make(other, on, "fp32", tmp_path).rate_from != known.rate_from, "another recipe goes otherwise"
    forecast.write(tmp_path / "run" / forecast.FILE, known)
    assert forecast.read(tmp_path / "run") == known


def test_cards_are_known_by_the_names_that_drivers_and_ray_give() -> None:
    assert flops.gpu_peak("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert flops.gpu_peak("NVIDIA H100 PCIe", "bf16") == 756e12
    assert flops.gpu_peak("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert flops.gpu_peak("NVIDIA L40S", "bf16") != flops.gpu_peak("NVIDIA L4", "bf16")
    assert flops.gpu_peak("A card of tomorrow", "bf16") is None
    assert device.of_gpu("A100", "bf16").memory_bytes == 40 * GIB


def test_mfu_is_the_share_of_the_peak() -> None:
    assert flops.mfu(2e9, 100, 1e12) == pytest.approx(0.2)
    assert flops.cpu_peak(1, "fp32", side=128) > 1e8


def batch(rows: int) -> Batch:
    return Batch(
        images=torch.zeros(rows, 3, 8, 8, dtype=torch.uint8),
        captions=("",) * rows,
        sample_ids=tuple(range(rows)),
        epochs=(0,) * rows,
        position=24,
        valid=(True,) * rows,
        bucket=0,
        sizes=torch.zeros(rows, 6, dtype=torch.int32),
    )


@pytest.mark.parametrize("kind", ["torch", pytest.param("python", marks=pytest.mark.slow)])
def test_a_step_without_memory_says_of_which_batch_and_what_would_fit(kind: str) -> None:
    """The allocation is real, and no machine grants it."""

    def take(step: int, batch: Batch, clock: Stopwatch) -> dict[str, float]:
        with clock("backward"):
            _ = torch.empty(2**60, dtype=torch.uint8) if kind == "torch" else bytearray(2**60)
        return {}

    guarded = SaysWhatFits(take, recipe(), 1, torch.device("cpu"))
    with pytest.raises(TrainingError, match=r"no memory for step 4: it ran out in backward") as raised:
        guarded(3, batch(8), Stopwatch())
    text = raised.value.as_text()
    assert "8 rows of 3x8x8 in a micro-batch, 8 in this worker's batch, bucket 0 at position 24" in text
    assert "engine.micro_batch=4" in text


def test_other_failures_stay_what_they_are() -> None:
    def take(step: int, batch: Batch, clock: Stopwatch) -> dict[str, float]:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        SaysWhatFits(take, recipe(), 1, torch.device("cpu"))(0, batch(8), Stopwatch())
