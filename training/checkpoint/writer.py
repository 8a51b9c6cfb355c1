"""Writes checkpoints beside the training: the ranks' files, then the manifest, then what is old goes.

The threads of all ranks talk through a process group of their own, so that a rank whose storage fails tells the
others, and every rank learns whether a checkpoint exists.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from training.checkpoint.config import CheckpointConfig
from training.checkpoint.manifest import FileFacts, Manifest, parse
from training.checkpoint.retention import dropped
from training.checkpoint.slab import Slab
from training.checkpoint.stored import Checkpoint
from training.checkpoint.vault import open_vault
from training.data.storage import Folder
from training.errors import CheckpointError, DarkroomError, StorageError

T = TypeVar("T")
NICE = 10
"""How far the writing stands back for the training, where both want the same core."""
_PATIENCE = timedelta(hours=2)
"""How long ranks wait for the slowest storage."""


@dataclass(frozen=True)
class Save:
    """A checkpoint to be written.

    Attributes:
        step: optimizer steps done.
        position: samples consumed.
        slab: this rank's state; stays as it is until it is written.
        metrics: measured at this step.
        about: what the run records; rank 0's is written.
        first: rank 0 calls it before the checkpoint can be seen.
        release: called once ``slab`` may change.
    """

    step: int
    position: int
    slab: Slab
    metrics: Mapping[str, float]
    about: Mapping[str, Any]
    first: Callable[[], None]
    release: Callable[[], None]


class Writer:
    """One rank's; a save at a time: one that is due while another is written waits for it.

    Args:
        folder: where the run's checkpoints lie.
        config: which of them are kept.
        token: names this attempt of the run, the same on every rank.
        rank: this process.
        world: how many there are.
    """

    def __init__(self, folder: Folder, config: CheckpointConfig, token: str, rank: int = 0, world: int = 1) -> None:
        self._vault = open_vault(folder, token)
        self._folder, self._config, self._rank, self._world = folder, config, rank, world
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=_stand_back)
        self._running: Future[Checkpoint] | None = None
        self._group: Any = None
        self._written: list[Checkpoint] = []
        self._lock = threading.Lock()

    @property
    def busy(self) -> bool:
        """Whether a save is being written."""
        return self._running is not None and not self._running.done()

    def wait(self, limit_s: float | None = None) -> None:
        """Until the running save is done.

        Args:
            limit_s: seconds; None waits for as long as it takes.

        Raises:
            TimeoutError: it is not.
            StorageError: some rank's storage refused; every rank raises it.
            CheckpointError: a rank went away meanwhile.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result(limit_s)

    def begin(self, save: Save) -> None:
        """Write a save beside, once the one before is done. Every rank calls it at the same step.

        Raises:
            StorageError: the one before came to nothing; so does this one.
        """
        try:
            self.wait()
        except BaseException:
            save.release()
            raise
        if self._world > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._running = self._thread.submit(self._write, save)

    def written(self) -> list[Checkpoint]:
        """The checkpoints that came to exist since the last call."""
        with self._lock:
            written, self._written = self._written, []
        return written

    def close(self) -> None:
        """Nothing more will be written; a running save is left to itself."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _write(self, save: Save) -> Checkpoint:
        scalars = dict(save.slab.scalars)  # of this step, which a slab that was let go no longer holds
        try:
            outcome = _outcome(lambda: self._vault.write(save.step, save.slab, self._rank, self._world))
        finally:
            save.release()
        outcomes = self._gathered(outcome)
        for told in outcomes:
            if isinstance(told, DarkroomError):
                raise told
        result = _outcome(lambda: self._commit(save, scalars, outcomes)) if self._rank == 0 else None
        (committed, *_) = self._gathered(result)
        if isinstance(committed, DarkroomError):
            raise committed
        saved: Checkpoint = committed
        with self._lock:
            self._written.append(saved)
        return saved

    def _commit(self, save: Save, scalars: Mapping[str, float], files: list[dict[str, FileFacts]]) -> Checkpoint:
        told = Manifest(
            step=save.step,
            position=save.position,
            written_s=time.time(),
            files={name: facts for each in files for name, facts in each.items()},
            scalars=dict(scalars),
            metrics=dict(save.metrics),
            about=dict(save.about),
        )
        save.first()
        folder = self._vault.commit(told)
        saved = Checkpoint(folder, parse(told.sealed(), folder.place))
        self._vault.sweep()  # first: what was never whole is none of those that are kept
        for step in dropped(self._folder, self._vault.steps(), save.step, self._config):
            self._vault.remove(step)
        return saved

    def _gathered(self, mine: Any) -> list[Any]:
        if self._world == 1:
            return [mine]
        everyone: list[Any] = [None] * self._world
        try:
            dist.all_gather_object(everyone, mine, group=self._group)
        except RuntimeError as error:
            raise CheckpointError("A rank went away while a checkpoint was written.", rule=str(error)) from error
        return everyone


def _outcome(action: Callable[[], T]) -> T | DarkroomError:
    """What comes of it, or why it failed: a rank that fails still has to tell the others."""
    try:
        return action()
    except DarkroomError as error:
        return error
    except Exception as error:  # noqa: BLE001  raised on every rank, by whoever waits for the save
        return StorageError("A checkpoint could not be written.", rule=f"{type(error).__name__}: {error}")


def _stand_back() -> None:
    if sys.platform == "linux":  # where it is of the thread, and not of the process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
