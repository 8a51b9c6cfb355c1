"""A run has one writer: the lock is kept while its holder lives, waited for, and refused with the holder's name."""

import errno
import fcntl
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from training.errors import TrainingError
from training.run_lock import hold


@pytest.fixture
def holder(tmp_path: Path) -> Callable[[], int]:
    """``holder()``: a process that holds the run's lock until it is killed; returns its id."""

    def start() -> int:
        ready, done = os.pipe()
        child = os.fork()
        if child == 0:
            hold(tmp_path, on_wait=lambda _: None, give_up=lambda: False)
            os.write(done, b"x")
            signal.pause()
            os._exit(0)
        assert os.read(ready, 1) == b"x"
        os.close(ready)
        os.close(done)
        return child

    return start


def end(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_a_lock_that_is_kept_is_refused_in_words(tmp_path: Path, holder: Callable[[], int]) -> None:
    process, told = holder(), []
    with pytest.raises(TrainingError) as caught:
        hold(tmp_path, on_wait=told.append, give_up=lambda: False, wait_s=0)
    end(process)
    text = str(caught.value)
    assert "Another process trains this run." in text
    assert str(tmp_path / "lock") in text
    assert f"process {process} on {socket.gethostname()}" in text
    assert "--set name=..." in text
    assert told == [
        f"Waiting up to 0 s for process {process} on {socket.gethostname()}, which still works on this run."
    ]


def test_a_killed_holder_keeps_nothing(tmp_path: Path, holder: Callable[[], int]) -> None:
    process = holder()

    def kill(_: str) -> None:
        end(process)

    handle = hold(tmp_path, on_wait=kill, give_up=lambda: False)
    assert handle is not None
    with pytest.raises(TrainingError, match=f"process {os.getpid()} on"):
        hold(tmp_path, on_wait=lambda _: None, give_up=lambda: False, wait_s=0)
    os.close(handle)


def test_the_wait_can_be_given_up(tmp_path: Path, holder: Callable[[], int]) -> None:
    process = holder()
    assert hold(tmp_path, on_wait=lambda _: None, give_up=lambda: True) is None
    end(process)


def test_storage_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(TrainingError, match="cannot be locked") as caught:
        hold(tmp_path, on_wait=lambda _: None, give_up=lambda: False)
    assert "No locks available" in str(caught.value)
