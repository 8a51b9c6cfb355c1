"""The last whole step of one rank in the memory of its node, where it outlives the process.

``/dev/shm/darkroom-UID/RUN/rank-K`` holds ``layout.json``, which says where each part lies, and a few slots. A step is
copied into a slot that holds neither the last whole one nor one that is still being written to storage. All ranks take
a step together, so that none begins the next before each has committed this one: a step that all of them hold is in
their memories at any moment.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.checkpoint import room
from training.checkpoint.layout import Layout
from training.checkpoint.room import ROOT
from training.checkpoint.slot import Slot

if TYPE_CHECKING:
    import torch

SLOTS = 3
"""The last whole step, the next, and one that is being written to storage."""
FORGOTTEN_S = 24 * 3600.0
"""After so long, the memory of a run that nobody went on with is freed."""
_TAKEN_S = 10.0
_LOOK_S = 0.02


class NodeMemory:
    """One rank's memory on its node. Use ``NodeMemory.open``.

    Args:
        folder: the rank's.
        lock: held as long as the process lives.
        identity: of the run; what is kept for another is not read.
    """

    def __init__(self, folder: Path, lock: int, identity: str) -> None:
        self._folder, self._lock, self._identity = folder, lock, identity
        self._layout: Layout | None = None
        self._slots: list[Slot] = []
        self._filled: Slot | None = None
        self._filled_step = -1
        self._pinned: Slot | None = None
        self.ignored = self._recover()

    @classmethod
    def open(cls, run_dir: Path, rank: int, identity: Mapping[str, Any], root: Path = ROOT) -> NodeMemory | str:
        """This rank's memory, with what a process that is gone has left in it.

        Args:
            run_dir: names the run.
            rank: of this process.
            identity: JSON; a state that was kept with another one is ignored.
            root: a folder in memory, or on a local disk; made if need be.

        Returns:
            Or why there is none.
        """
        try:
            root.mkdir(parents=True, exist_ok=True)
            top = _own_folder(root)
            _forget_old(top)
            name = hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:16]
            folder = top / name / f"rank-{rank}"
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if not _locked(lock, time.monotonic() + _TAKEN_S):
                os.close(lock)
                return f"another process still uses {folder}"
        except OSError as error:
            return f"{root}: {error.strerror}"
        return cls(folder, lock, _digest(identity))

    @property
    def steps(self) -> list[int]:
        """The whole steps in it."""
        return sorted(slot.step for slot in self._slots if slot.step is not None)

    def slot(self, step: int) -> Slot | None:
        """Where a whole step, or the last one that was put in, lies."""
        if self._filled is not None and self._filled_step == step:
            return self._filled
        return next((slot for slot in self._slots if slot.step == step), None)

    def put(self, step: int, layout: Layout, values: Sequence[torch.Tensor], scalars: Mapping[str, float]) -> None:
        """Copy a state in. The last whole step stays, until this one is committed.

        Args:
            step: optimizer steps done.
            layout: where each part lies.
            values: of its entries.
            scalars: the engine's.

        Raises:
            CheckpointError: the node has not so much memory to spare for this rank and the others.
        """
        try:
            self._put(step, layout, values, scalars)
        except OSError as error:
            raise room.too_little(f"{SLOTS * layout.size} bytes", error.strerror or str(error)) from error

    def _put(self, step: int, layout: Layout, values: Sequence[torch.Tensor], scalars: Mapping[str, float]) -> None:
        if layout is not self._layout and layout != self._layout:
            self._make(layout)
        self._layout = layout
        slot = self._free_slot()
        self._filled, self._filled_step = None, -1
        slot.put(values, scalars)
        self._filled, self._filled_step = slot, step

    def commit(self, step: int, told: Mapping[str, Any]) -> None:
        """The state that was put in last is whole, and the one to go on from."""
        if self._filled is not None and self._filled_step == step:
            self._filled.commit(step, told)
            os.utime(self._lock)  # stores through a mapping leave no trace of when they were made

    def pin(self, step: int) -> Slot | None:
        """Keep a state as it is until ``unpin``; None where it is not there or memory is short."""
        slot = self.slot(step)
        if slot is None or self._pinned is not None or not self._grown():
            return None
        self._pinned = slot
        return slot

    def unpin(self) -> None:
        """The pinned state may go."""
        self._pinned = None

    def renew(self, identity: Mapping[str, Any]) -> None:
        """Forget all, for the run goes on from elsewhere; what is kept from now on is of another identity.

        What ranks have left that are no longer on this node goes as well, so each rank that is has its own open.
        """
        self._identity = _digest(identity)
        self._slots, self._filled, self._layout = [], None, None
        (self._folder / "layout.json").unlink(missing_ok=True)
        for folder in self._folder.parent.glob("rank-*"):
            if folder != self._folder:
                with contextlib.suppress(OSError), _unused(folder) as unused:  # gone already, or another rank is at it
                    if unused:
                        shutil.rmtree(folder)

    def forget(self, after: int) -> None:
        """Whole states of steps after ``after`` are no longer to be gone on from."""
        for slot in self._slots:
            if slot.step is not None and slot.step > after:
                slot.invalidate()

    def close(self) -> None:
        """Leave what is in it to the next process."""
        self._slots, self._filled, self._pinned, self._layout = [], None, None, None
        os.close(self._lock)

    def clear(self) -> None:
        """Free the memory: the run has come to its end, or its state is in storage."""
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # other ranks still have theirs
            self._folder.parent.rmdir()

    def _recover(self) -> str | None:
        """Open what is there; says why it is of no use."""
        if not (self._folder / "layout.json").is_file():
            return None
        try:
            known = json.loads((self._folder / "layout.json").read_bytes())
            layout = Layout.from_json(known["layout"].encode())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return "it cannot be read"
        if known["identity"] != self._identity:
            return "it is of another run, recipe, data set, engine or number of workers"
        found = (Slot.open(self._folder / f"slot-{number}", layout) for number in range(SLOTS))
        self._slots = [slot for slot in found if slot is not None]
        self._layout = layout
        return None

    def _make(self, layout: Layout) -> None:
        """Begin anew with another layout."""
        self._slots, self._filled = [], None
        for path in self._folder.glob("slot-*"):
            path.unlink()
        room.claim(self._folder, SLOTS * layout.size, f"{SLOTS} states")
        text = json.dumps({"identity": self._identity, "layout": layout.as_json().decode()})
        aside = self._folder / "layout.partial"
        aside.write_text(text)
        aside.rename(self._folder / "layout.json")
        self._layout = layout
        self._slots = [Slot.create(self._folder / f"slot-{number}", layout) for number in range(2)]

    def _free_slot(self) -> Slot:
        """One that holds neither the newest whole state nor the pinned one; the oldest of several."""
        newest = max(self._slots, key=lambda slot: -1 if slot.step is None else slot.step)
        while len(self._slots) < 2:
            self._add()
        able = [slot for slot in self._slots if slot is not self._pinned and (slot is not newest or slot.step is None)]
        return min(able, key=lambda slot: -1 if slot.step is None else slot.step)

    def _grown(self) -> bool:
        """Whether there is a slot to spare for a pinned one."""
        try:
            while len(self._slots) < SLOTS:
                self._add()
        except OSError:
            return False
        return True

    def _add(self) -> None:
        if self._layout is None:
            raise TypeError("a slot has a layout")
        taken = {slot.path.name for slot in self._slots}
        name = next(f"slot-{number}" for number in range(SLOTS) if f"slot-{number}" not in taken)
        (self._folder / name).unlink(missing_ok=True)
        self._slots.append(Slot.create(self._folder / name, self._layout))


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _own_folder(root: Path) -> Path:
    """A folder that only this user can open."""
    folder = root / f"darkroom-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    facts = folder.lstat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o177077 != 0o40000:
        raise PermissionError(1, "the folder is open to others", str(folder))
    return folder


def _forget_old(top: Path) -> None:
    """Free the memory of runs that were killed and never gone on with."""
    for folder in top.iterdir():
        with contextlib.suppress(OSError):  # it is somebody's after all, or gone already
            used_s = max((path.stat().st_mtime for path in folder.glob("*/*")), default=folder.stat().st_mtime)
            if time.time() - used_s > FORGOTTEN_S:
                with contextlib.ExitStack() as held:
                    if all(held.enter_context(_unused(each)) for each in folder.iterdir()):
                        shutil.rmtree(folder)


@contextlib.contextmanager
def _unused(folder: Path) -> Iterator[bool]:
    """Whether no process has a rank's folder; inside, none can take it."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    try:
        yield _locked(lock, 0.0)
    finally:
        os.close(lock)


def _locked(handle: int, until_s: float) -> bool:
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until_s:
                return False
            time.sleep(_LOOK_S)
        else:
            return True
