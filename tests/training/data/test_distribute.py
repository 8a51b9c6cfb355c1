"""A build on Ray Data gives the same bytes as one in this process, and survives what its actors do not."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.stack import Stack
from tests.training.data.ledgers import read_ledger
from training.data.blocks import Block
from training.data.build import build
from training.data.config import BuildConfig
from training.data.executor import Failure, LocalExecutor
from training.data.normalise import JpegStore
from training.data.progress import Step
from training.data.sources import Item
from training.errors import StorageError

Encode = Callable[..., bytes]
CONFIG = BuildConfig(held_out=0.3, store=JpegStore(quality=80))

WORK = '''
import os, signal
from dataclasses import dataclass
from pathlib import Path
from training.errors import StorageError

@dataclass(frozen=True)
class Double:
    """Doubles a block's number; what it must not do, it does at the numbers that are named."""
    folder: Path
    fatal: int = -1
    fatal_once: int = -1
    broken: int = -1
    refused: int = -1

    def __call__(self, block):
        if block.number == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        if block.number == self.fatal_once:
            try:
                (self.folder / "once").touch(exist_ok=False)
            except FileExistsError:
                return 2 * block.number
            os.kill(os.getpid(), signal.SIGKILL)
        if block.number == self.broken:
            raise RuntimeError("a fault of ours")
        if block.number == self.refused:
            raise StorageError("The bucket is gone.", value="s3://gone")
        return 2 * block.number
'''


def _files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_build_on_ray_data_is_resumed_and_gives_the_same_bytes(
    ray_session: Stack, tmp_path: Path, encode: Encode
) -> None:
    from training.data.distribute import RayExecutor

    source = tmp_path / "source"
    source.mkdir()
    for number in range(24):
        (source / f"{number:02d}.png").write_bytes(encode(number, size=(64, 48)) if number != 7 else b"no picture")
    build(source, tmp_path / "local", CONFIG, executor=LocalExecutor(1))

    def interrupt(step: Step) -> None:
        if step.stage == "judge" and step.done >= 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path / "ray", CONFIG, interrupt, executor=LocalExecutor(1), block_inputs=3)
    steps: list[Step] = []
    build(source, tmp_path / "ray", CONFIG, steps.append, executor=RayExecutor(), block_inputs=3)
    assert max(step.found for step in steps) == 9
    assert _files(tmp_path / "ray") == _files(tmp_path / "local")
    assert sum(row.kept for row in read_ledger(tmp_path / "ray")) == 23


def test_actors_that_die_and_jobs_that_fail(
    ray_session: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from training.data.distribute import RayExecutor

    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "doubling.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    ray.shutdown()
    runtime = {
        "env_vars": {"PYTHONPATH": os.pathsep.join([str(tmp_path / "modules"), os.environ.get("PYTHONPATH", "")])}
    }
    ray.init(log_to_driver=False, namespace="tests", runtime_env=runtime)
    double = importlib.import_module("doubling").Double
    blocks = [Block(number, number, (Item(f"{number}.png"),)) for number in range(8)]

    def done(work: Callable[[Block], int]) -> dict[int, int | Failure]:
        return {job.number: result for job, result in RayExecutor(2).run(work, iter(blocks))}

    doubled = {number: 2 * number for number in range(8)}
    assert done(double(tmp_path, fatal_once=3)) == doubled
    found = done(double(tmp_path, fatal=3, broken=5))
    assert isinstance(found[3], Failure)
    assert found[3].died
    assert found[5] == Failure("RuntimeError: a fault of ours")
    assert {number: found[number] for number in doubled if number not in {3, 5}} == {
        0: 0,
        1: 2,
        2: 4,
        4: 8,
        6: 12,
        7: 14,
    }
    with pytest.raises(StorageError, match="The bucket is gone"):
        done(double(tmp_path, refused=2))
