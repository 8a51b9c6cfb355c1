"""What the recipe's engine section means to DeepSpeed and to the network."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from training.engine_config import EngineConfig
from training.errors import ConfigError
from training.precision import AUTOCAST, Resolved, has_fp8

_NO_LIMIT = 10**12


def deepspeed_options(
    config: EngineConfig, stage: int, world: int, micro_batch: int, accumulation: int
) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Args:
        config: the recipe's engine section.
        stage: of ZeRO.
        world: processes.
        micro_batch: rows of a forward.
        accumulation: forwards of a step.
    """
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["sub_group_size"] = _NO_LIMIT  # a step of the optimizer is one call for each parameter group
    options: dict[str, Any] = {
        "train_batch_size": world * micro_batch * accumulation,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.gradient_clip if stage else 0.0,
        "communication_data_type": "fp32",  # gradients are summed in it, whatever the products were computed in
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": 2**31 - 1,
    }
    if config.offload != "none":  # to a disk the engine brings it itself, from there
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return options


def prepare(module: torch.nn.Module, config: EngineConfig, precision: Resolved) -> None:
    """Make the module ready as the recipe says, before the engine takes it. Weights keep their names and values.

    Raises:
        ConfigError: this machine or this network cannot.
    """
    if precision == "fp8":
        _convert_to_fp8(module)
    if config.gradient_checkpointing:
        _checkpoint_gradients(module)
    if precision in AUTOCAST:
        # within the module: DeepSpeed turns off what is around it, and its own comes with a loss scale of its own
        on = torch.autocast("cuda" if torch.cuda.is_available() else "cpu", AUTOCAST[precision])
        module.forward = on(module.forward)
    if config.compile != "none":
        _require_compiler(config.compile)
        for part in _compiled(module, config.compile):
            part.compile()


def _convert_to_fp8(module: torch.nn.Module) -> None:
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            "fp8 needs the package torchao, which is not installed.",
            value="engine.precision: fp8",
            rule="torchao, and GPUs of compute capability 9.0 or higher (Hopper and newer)",
            options=["bf16", "fp32"],
            mend="pip install torchao in the image of the workers",
        )
    if not has_fp8():
        raise ConfigError(
            "This machine does not multiply in fp8.",
            value="engine.precision: fp8",
            rule="a GPU of compute capability 9.0 or higher (Hopper and newer)",
            options=["bf16", "fp32"],
        )
    importlib.import_module("torchao.float8").convert_to_float8_training(module, module_filter_fn=_takes_fp8)


def _takes_fp8(module: torch.nn.Module, name: str) -> bool:  # noqa: ARG001  torchao's signature
    """Its kernels want sides that are multiples of 16."""
    return isinstance(module, torch.nn.Linear) and not (module.in_features % 16 or module.out_features % 16)


def _checkpoint_gradients(module: torch.nn.Module) -> None:
    able = [part for part in module.modules() if getattr(part, "_supports_gradient_checkpointing", False)]
    if not able:
        raise ConfigError(
            "The network cannot compute its activations again.",
            value="engine.gradient_checkpointing: true",
            rule="a network whose class in diffusers supports gradient checkpointing",
            options=["engine.gradient_checkpointing: false"],
        )
    for part in able:
        part.enable_gradient_checkpointing()  # type: ignore[operator]  # diffusers' models have it


def _require_compiler(what: str) -> None:
    if torch.cuda.is_available():
        return
    if what == "whole":
        raise ConfigError(
            "A whole network is not compiled for a CPU.",
            value="engine.compile: whole",
            rule="a GPU: torch 2.13's Inductor makes CPU code that leaves gradients of convolutions at 0",
            options=["engine.compile: blocks", "engine.compile: none"],
        )
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(
            "torch.compile needs a C++ compiler on a CPU, and there is none.",
            value="engine.compile",
            rule="g++ or clang++ on the path, or its name in CXX",
            options=["engine.compile: none"],
            mend="install g++ in the image of the workers",
        ) from error


def _compiled(module: torch.nn.Module, what: str) -> list[torch.nn.Module]:
    if what == "whole":
        return [module]
    named = {name for part in module.modules() for name in getattr(part, "_repeated_blocks", None) or ()}
    blocks = [part for part in module.modules() if type(part).__name__ in named]
    if blocks:
        return blocks
    lists = [part for part in module.modules() if isinstance(part, torch.nn.ModuleList)]
    inside = {id(part) for outer in lists for inner in outer for part in inner.modules()}
    return [block for outer in lists if id(outer) not in inside for block in outer] or [module]
