"""The objective that a pipeline's network was trained with, from its scheduler's config; read without torch."""

from __future__ import annotations

import math
from typing import Any

from training.errors import ConfigError

_STEPS = 1000
_BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


def objective_of(scheduler: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The recipe's section of a scheduler's config.

    Args:
        scheduler: ``scheduler_config.json``.
        tokens: patches of a picture of the run's resolution, which some schedulers shift their times by.

    Raises:
        ConfigError: no objective of ours is of this scheduler.
    """
    name = str(scheduler.get("_class_name"))
    if name.startswith("EDM"):
        return {"kind": "edm", **{key: scheduler[key] for key in ("sigma_data", "sigma_min", "sigma_max")}}
    prediction = str(scheduler.get("prediction_type", "epsilon"))
    if name.startswith("FlowMatch") or scheduler.get("use_flow_sigmas") or prediction == "flow_prediction":
        return {"kind": "rectified_flow", "time_shift": _time_shift(scheduler, tokens)}
    kind = _PREDICTIONS.get(prediction)
    if kind is None:
        raise _unknown(name, "prediction_type", prediction, _PREDICTIONS)
    return {"kind": kind, "noise_schedule": _noise_schedule(name, scheduler)}


def _time_shift(scheduler: dict[str, Any], tokens: int) -> float:
    """The shift of rectified flow's times (Esser et al. 2024, eq. 23)."""
    if not scheduler.get("use_dynamic_shifting"):
        # diffusers' solvers for other schedules call it flow_shift
        return float(scheduler.get("flow_shift") or scheduler.get("shift") or 1.0)
    # as diffusers' calculate_shift: a line through two sizes, in the shift's logarithm
    first, last = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    shift = low + (high - low) * (tokens - first) / (last - first)
    return math.exp(shift) if scheduler.get("time_shift_type", "exponential") == "exponential" else float(shift)


def _noise_schedule(name: str, scheduler: dict[str, Any]) -> dict[str, Any]:
    if scheduler.get("num_train_timesteps", _STEPS) != _STEPS:
        raise _unknown(name, "num_train_timesteps", scheduler["num_train_timesteps"], [_STEPS])
    if scheduler.get("trained_betas"):
        raise _unknown(name, "trained_betas", "a list", _BETAS)
    betas = str(scheduler.get("beta_schedule", "linear"))
    if betas not in _BETAS:
        raise _unknown(name, "beta_schedule", betas, _BETAS)
    told: dict[str, Any] = {
        "kind": _BETAS[betas],
        "zero_terminal_snr": bool(scheduler.get("rescale_betas_zero_snr", False)),
    }
    if told["kind"] != "cosine":
        told |= {key: float(scheduler[key]) for key in ("beta_start", "beta_end") if key in scheduler}
    return told


def _unknown(name: str, key: str, value: object, options: Any) -> ConfigError:
    return ConfigError(
        f"The pipeline's scheduler {name} trains no network of ours.",
        value=f"{key}: {value}",
        rule=f"{key} is one of",
        options=list(options),
        mend="state the objective section in the recipe, if you know that the network was trained with it",
    )
