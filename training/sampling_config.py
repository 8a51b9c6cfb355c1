"""Which samplers there are, without the tensors that they need."""

from __future__ import annotations

from typing import Literal, get_args

SamplerName = Literal["euler", "heun", "dpmpp_2m", "ancestral", "lcm"]
"""Euler's method, which is DDIM; Heun's, two evaluations a step; DPM-Solver++ 2M; Euler with fresh noise, like DDPM;
the prediction with all its noise drawn anew, for a few steps of a model that was distilled for them."""

SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)

STOCHASTIC: tuple[SamplerName, ...] = ("ancestral", "lcm")
"""Those that draw noise on the way."""
