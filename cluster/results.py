"""Results and messages of a Ray job, told apart: Ray keeps both in one log.

On the cluster, ``python -m cluster.results COMMAND ...`` runs the command and marks each line of its stdout. Here,
``Splitter`` writes marked lines to stdout and everything else to stderr, as the command itself would have done.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TextIO

MARK = "\x1edarkroom-result:"
"""Begins with a control character, which JSON never holds and a log hardly."""


class Splitter:
    """Takes a job's log in pieces and passes each whole line on.

    Args:
        results: gets what the command wrote to its stdout.
        messages: gets the rest.
    """

    def __init__(self, results: TextIO, messages: TextIO) -> None:
        self._results, self._messages = results, messages
        self._rest = ""

    def take(self, text: str) -> None:
        """Pass on every line that is complete by now."""
        *whole, self._rest = (self._rest + text).split("\n")
        for line in whole:
            self._pass(line, "\n")

    def close(self) -> None:
        """Pass on a last line without an end."""
        self._pass(self._rest, "")
        self._rest = ""

    def _pass(self, line: str, end: str) -> None:
        # what stands before the mark is a message whose line had not ended when the result came
        message, mark, result = line.partition(MARK)
        if mark:
            self._results.write(result + end)
            self._results.flush()
        if message or not mark:
            self._messages.write(message + ("\n" if mark else end))
            self._messages.flush()


def main() -> None:
    """Run the command that the arguments name; its exit code is ours."""
    with subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True, errors="replace") as command:
        for line in command.stdout or ():
            # one write a line, so that a message cannot come between
            sys.stdout.write(f"{MARK}{line}" if line.endswith("\n") else f"{MARK}{line}\n")
            sys.stdout.flush()
    # a shell's way to name a signal
    sys.exit(command.returncode if command.returncode >= 0 else 128 - command.returncode)


if __name__ == "__main__":
    main()
