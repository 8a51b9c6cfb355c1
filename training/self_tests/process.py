"""What one training process does of a self-test."""

from __future__ import annotations

import importlib
import os
import signal
from pathlib import Path
from typing import Any

import torch.distributed as dist

from training import parallel
from training.errors import UsageError
from training.self_tests import CHECKS
from training.self_tests.finding import Finding
from training.self_tests.ground import Ground
from training.self_tests.spec import SelfTestSpec
from training.spec import Emit


def main(spec: SelfTestSpec, emit: Emit) -> None:
    """Join the other ranks and check; rank 0 tells what was found.

    Raises:
        UsageError: there is no such check.
    """
    if spec.check not in CHECKS:
        raise UsageError("There is no such self-test.", value=spec.check, rule="one of", options=list(CHECKS))
    module: Any = importlib.import_module(f"training.self_tests.{spec.check}")
    parallel.connect(spec.rank, spec.local_rank, spec.world, spec.address, spec.port)
    ground = Ground(Path(spec.folder), spec.rank, spec.world)
    if spec.phase == "prepare":
        module.prepare(ground)
        dist.barrier()  # none goes before all are ready
        os.kill(os.getpid(), signal.SIGKILL)
    found: Finding = module.check(ground)
    if spec.rank == 0:
        emit({"event": "finding", **found.as_dict()})
    dist.destroy_process_group()
