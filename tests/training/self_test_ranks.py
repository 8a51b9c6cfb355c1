"""The program of ``test_self_tests.py``: it breaks something, and lets it be found.

Two ranks make every case; rank 0 leaves the findings as JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.training.forked import together
from training.data.encoded.latent_reader import LatentReader
from training.data.loader import Loader
from training.ema import Ema, EmaConfig
from training.optim import muon_steps
from training.parallel import Engine, connect
from training.self_tests import CHECKS, PREPARED
from training.self_tests.ground import Ground

WORLD = 2
Break = Callable[[], Any]


def frozen_average() -> Any:
    """The average is never moved: a decay of 1."""
    return mock.patch.object(EmaConfig, "decay_at", return_value=1.0)


def cold_average() -> Any:
    """The average remembers its start from the first step on."""
    return mock.patch.object(EmaConfig, "decay_at", lambda self, _updates: self.decay)


def lost_micro_batch() -> Any:
    """The first micro-batch's gradient is that of the last."""
    real = Engine.step

    def step(self: Engine, micro_batches: Iterator[Any], *rest: Any) -> Any:
        every = list(micro_batches)
        return real(self, iter([every[-1]] * len(every)), *rest)

    return mock.patch.object(Engine, "step", step)


def rounded_weights() -> Any:
    """After every step, the weights are what bf16 holds."""
    real = Engine.step

    def step(self: Engine, *arguments: Any) -> Any:
        told = real(self, *arguments)
        for part in self.parts():
            if part.group == "weights":
                part.values.copy_(part.values.bfloat16())
        return told

    return mock.patch.object(Engine, "step", step)


def garbled_sum() -> Any:
    """A large sum over the ranks loses a bit on its way."""
    real = dist.all_reduce

    def all_reduce(tensor: torch.Tensor, *rest: Any, **options: Any) -> Any:
        told = real(tensor, *rest, **options)
        if tensor.numel() == 1 << 16:
            tensor[17] += 1
        return told

    return mock.patch.object(dist, "all_reduce", all_reduce)


def forgotten_average() -> Any:
    """Going on, the average begins anew."""
    return mock.patch.object(Ema, "take", return_value=None)


def one_place() -> Any:
    """All ranks read as rank 0."""
    real = Loader.open.__func__  # type: ignore[attr-defined]
    return mock.patch.object(
        Loader, "open", classmethod(lambda cls, *args, **options: real(cls, *args, **{**options, "rank": 0}))
    )


def unscaled_latents() -> Any:
    """Kept latents are of another scale."""
    real = LatentReader.read

    def read(self: LatentReader, sample_id: int, epoch: int, row: Any) -> Any:
        told = real(self, sample_id, epoch, row)
        row *= 1.1
        return told

    return mock.patch.object(LatentReader, "read", read)


def plain_momentum() -> Any:
    """Muon's updates are not made orthogonal."""
    return mock.patch.object(muon_steps, "orthogonal", lambda matrix, _iterations: matrix)


CASES: dict[str, tuple[str, Break]] = {
    **{check: (check, contextlib.nullcontext) for check in CHECKS},
    "an average that is frozen": ("average", frozen_average),
    "an average that starts cold": ("average", cold_average),
    "a lost micro-batch": ("zero_stages", lost_micro_batch),
    "rounded weights": ("master_weights", rounded_weights),
    "a garbled sum": ("precision", garbled_sum),
    "plain momentum": ("muon", plain_momentum),
    "a forgotten average": ("resume", forgotten_average),
    "ranks that read the same": ("samples", one_place),
    "latents of another scale": ("latents", unscaled_latents),
}
"""By name: the check that looks, and what is broken meanwhile. First, every check with nothing broken."""


def rank(number: int, world: int, port: int, names: list[str], phase: str, out: Path) -> None:
    """One process, for one case or for several after one another."""
    torch.set_num_threads(1)
    connect(number, number, world, "127.0.0.1", port)
    for name in names:
        check, broken = CASES[name]
        ground = Ground(out / name, number, world)
        module = importlib.import_module(f"training.self_tests.{check}")
        if phase == "prepare":
            module.prepare(ground)
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        with broken():
            found = module.check(ground)
        if number == 0:
            (out / f"{name}.json").write_text(json.dumps(found.as_dict()))
    dist.destroy_process_group()


def main(words: list[str]) -> int:
    """Every case; 1 where one could not be made."""
    out = Path(words[0])
    for name in CASES:
        (out / name).mkdir()
    prepared = [name for name, (check, _) in CASES.items() if check in PREPARED]
    ends = together(WORLD, rank, [name for name in CASES if name not in prepared], "check", out)
    for name in prepared:
        together(WORLD, rank, [name], "prepare", out)
        ends += together(WORLD, rank, [name], "check", out)
    return int(any(ends))
