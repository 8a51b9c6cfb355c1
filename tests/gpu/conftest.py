"""The tiny runs of ``tests/training``, with a fork server of their own: it is for GPUs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "tests_training_conftest", Path(__file__).parents[1] / "training" / "conftest.py"
)
if _spec is None or _spec.loader is None:
    raise ImportError("tests/training/conftest.py")
_shared = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _shared  # where dataclasses look their annotations up
_spec.loader.exec_module(_shared)

fork_server, look, peer_of, running_process = (
    _shared.fork_server,
    _shared.look,
    _shared.peer_of,
    _shared.running_process,
)
runs, tiny_data = _shared.runs, _shared.tiny_data
