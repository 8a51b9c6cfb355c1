"""Who works on a job: one replica at a time, and another one when that has died.

A replica claims a job by making the next ``attempt-N`` in it, which only one can; it touches that file while it is
alive. A replica that was only slow finds a higher number there, and stops.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Self

_ATTEMPT = re.compile(r"attempt-([1-9][0-9]{0,5})")


class Lease:
    """One replica's claim on a job.

    Attributes:
        attempt: the how-manieth replica this is.
    """

    def __init__(self, job: Path, attempt: int) -> None:
        self.attempt = attempt
        self._job = job
        self._file = job / f"attempt-{attempt}"

    @classmethod
    def claim(cls, job: Path, lease_s: float) -> Self | None:
        """Claim a job that nobody works on; None where somebody does, or where it is gone.

        Args:
            job: its folder.
            lease_s: seconds without a sign of life after which a replica has died.
        """
        latest = _latest(job)
        try:
            if latest and time.time() - (job / f"attempt-{latest}").stat().st_mtime < lease_s:
                return None
            os.close(os.open(job / f"attempt-{latest + 1}", os.O_CREAT | os.O_EXCL, 0o600))
        except (FileExistsError, FileNotFoundError):
            return None
        return cls(job, latest + 1)

    def renew(self) -> bool:
        """Show a sign of life; whether the job is still this replica's."""
        try:
            os.utime(self._file)
        except FileNotFoundError:
            return False
        return _latest(self._job) == self.attempt

    def release(self) -> None:
        """Let another replica claim it at once."""
        try:
            os.utime(self._file, (0, 0))
        except FileNotFoundError:  # the job was removed
            return


def _latest(job: Path) -> int:
    try:
        names = [entry.name for entry in os.scandir(job)]
    except FileNotFoundError:
        return 0
    return max((int(found[1]) for name in names if (found := _ATTEMPT.fullmatch(name))), default=0)
