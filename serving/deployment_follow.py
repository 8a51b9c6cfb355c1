"""A deployment that follows an alias: when ``champion`` moves, so does what serves."""

from __future__ import annotations

import threading
from collections.abc import Callable

from serving.config import ServeConfig
from serving.deployment_client import Progress
from serving.errors import ServeError
from serving.model import pinned
from training.errors import DarkroomError

RollOut = Callable[[ServeConfig], object]
"""Told a pinned config: put it in the place of what serves, or raise a ``ServeError`` and leave that as it was."""


def follow(
    config: ServeConfig,
    current: ServeConfig,
    every_s: float,
    roll_out: RollOut,
    progress: Progress,
    stopped: threading.Event,
) -> None:
    """Look where the alias points until ``stopped``, and roll out what it points at now.

    A version that could not be rolled out is not tried again until the alias has moved; a registry that does not answer
    is asked again.

    Args:
        config: what to serve, by its alias: not pinned.
        current: the same, pinned: what serves.
        every_s: seconds between two looks.
        roll_out: what replaces it.
        progress: told what happens.
        stopped: set it to end.
    """
    while not stopped.wait(every_s):
        try:
            latest = pinned(config)
        except DarkroomError as error:
            progress(f"cannot tell what {config.model} is: {error.message}")
            continue
        if latest.pinned == current.pinned:
            continue
        progress(f"{config.model} is {latest.model} now")
        current = latest
        try:
            roll_out(latest)
        except ServeError as error:
            progress(str(error))
