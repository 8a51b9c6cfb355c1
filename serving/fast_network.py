"""The network of a replica, as its switches make it: in bfloat16, compiled, or recorded as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial

import torch

from serving.errors import ServeError
from serving.speed import SpeedConfig
from training import models
from training.conditioning import Conditioning
from training.objectives import Network
from training.precision import has_bf16

_MOST_SHAPES = 1024
"""Compiled forms of one network, a form for each size, width and adapter: beyond that a call fails."""


def fast_network(
    module: torch.nn.Module, speed: SpeedConfig, *, device: str, variant: Callable[[], Hashable]
) -> Network:
    """The network contract over a diffusers model, with the switches that are on.

    Args:
        module: the model, on its device; it may be changed.
        speed: the switches.
        device: where it is.
        variant: what changes the network's kernels beside its inputs: the adapter that works.

    Raises:
        ServeError: the device cannot do what a switch asks for.
    """
    network: Network = partial(models.apply, module)
    if speed.compiled:
        _compile(module)
    if speed.bf16:
        if not has_bf16():
            rule = "a GPU or CPU that multiplies in bfloat16 itself"
            raise ServeError("speed.bf16 is of no use here.", value=device, rule=rule, mend="leave it off")
        network = partial(_in_bf16, network, device)
    if speed.cuda_graphs:
        if device == "cpu":
            rule = "the network is on a GPU"
            raise ServeError("speed.cuda_graphs needs a GPU.", value=device, rule=rule, mend="leave it off")
        network = Recorded(network, variant)
    return network


def _compile(module: torch.nn.Module) -> None:
    """In place: the model's class, by which it is called, stays.

    Every shape gets a form of its own, and none is ever made without one: an uncompiled network's bits differ.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = _MOST_SHAPES
    torch._dynamo.config.accumulated_recompile_limit = _MOST_SHAPES
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    module.compile(dynamic=False)


def _in_bf16(
    network: Network, device: str, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning
) -> torch.Tensor:
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        made = network(x, t, conditioning)
    return made.float()


class Recorded:
    """A network whose kernels are recorded once for each shape and variant, and then replayed in one launch.

    Args:
        network: on a GPU, without numbers that it reads from the host while it is called.
        variant: what changes its kernels beside its inputs' shapes.
    """

    def __init__(self, network: Network, variant: Callable[[], Hashable]) -> None:
        self._network = network
        self._variant = variant
        self._recordings: dict[Hashable, _Recording] = {}

    def __call__(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Predict."""
        key = (tuple(x.shape), tuple(conditioning.tokens.shape), self._variant())
        if key not in self._recordings:
            self._recordings[key] = _Recording(self._network, x, t, conditioning)
        return self._recordings[key].replay(x, t, conditioning)


class _Recording:
    """One shape's kernels, and the memory that they read and write."""

    def __init__(self, network: Network, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> None:
        pooled = None if conditioning.pooled is None else conditioning.pooled.clone()
        self._x, self._t = x.clone(), t.clone()
        self._told = Conditioning(conditioning.tokens.clone(), conditioning.mask.clone(), pooled)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries choose and allocate before anything is recorded
            for _ in range(3):
                network(self._x, self._t, self._told)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # other threads may use the device meanwhile: the autoencoder draws
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._made = network(self._x, self._t, self._told)

    def replay(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """What the network makes of these."""
        self._x.copy_(x)
        self._t.copy_(t)
        self._told.tokens.copy_(conditioning.tokens)
        self._told.mask.copy_(conditioning.mask)
        if self._told.pooled is not None and conditioning.pooled is not None:
            self._told.pooled.copy_(conditioning.pooled)
        self._graph.replay()
        return self._made.clone()
