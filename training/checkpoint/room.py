"""Whether a node has the memory, or its disk the room, that the ranks of a run ask of it together.

Ranks of a node begin at the same time, and each takes its memory bit by bit: what is free when one looks is what all
the others count on as well. So each puts down what it is going to take, and looks at what the others have.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from training.errors import CheckpointError

ROOT = Path("/dev/shm")  # noqa: S108  memory of the node, in folders that only their user can open
SPARE = 0.5
"""Of the node's free memory, the share that the ranks of a run may take together."""
_CLAIM = "claim"


def claim(folder: Path, needed_bytes: int, what: str) -> None:
    """Put down what a rank is going to take of its node's memory, in its folder beside those of the other ranks.

    Args:
        folder: the rank's; nothing in it takes memory yet.
        needed_bytes: how much it is going to be.
        what: it is for.

    Raises:
        CheckpointError: the node has not so much to spare for all of them.
        OSError: the folder cannot be used.
    """
    with _alone(folder.parent):
        (folder / _CLAIM).unlink(missing_ok=True)
        others = [each for each in folder.parent.glob("rank-*") if each != folder]
        taken = sum(map(_taken, others))
        theirs = sum(max(_claimed(each), _taken(each)) for each in others)
        spare = SPARE * (free_bytes(folder) + taken)
        if theirs + needed_bytes > spare:
            also = f", beside {theirs} bytes of this node's other ranks" if theirs else ""
            raise too_little(f"{needed_bytes} bytes for {what}{also}", f"at most {spare:.0f} bytes, half of the free")
        (folder / _CLAIM).write_text(str(needed_bytes))


def free_bytes(folder: Path) -> int:
    """What the file system has left, and the machine where it lies in memory."""
    import psutil  # late: whoever reads a recipe comes by here

    facts = os.statvfs(folder)
    free = facts.f_bavail * facts.f_frsize
    return min(free, int(psutil.virtual_memory().available)) if folder.is_relative_to(ROOT) else free


def too_little(value: str, rule: str) -> CheckpointError:
    """The node has not the memory."""
    return CheckpointError(
        "The node has too little shared memory to keep the last step.",
        value=value,
        rule=rule,
        mend="a larger /dev/shm, or checkpoint.memory_every_steps=0 with more frequent checkpoints",
    )


def _claimed(folder: Path) -> int:
    try:
        return int((folder / _CLAIM).read_text())
    except (OSError, ValueError):  # it has put down nothing, or was killed while it did
        return 0


def _taken(folder: Path) -> int:
    """What a rank's files take already."""
    total = 0
    for path in folder.glob("slot-*"):
        with contextlib.suppress(FileNotFoundError):  # it is just being replaced
            total += path.stat().st_blocks * 512
    return total


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other rank looks for room meanwhile."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
