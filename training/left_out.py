"""Steps that a guard did not trust, written down with the samples of their batches."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from training import ranks
from training.data.batch import Batch
from training.errors import StorageError
from training.guards import LeftOut
from training.spec import Emit

FILE = "left_out.jsonl"


def reasons(run_dir: Path) -> Iterator[tuple[tuple[int, int], str]]:
    """The first and the last of steps that were undone, and why, as a run has noted them."""
    path = run_dir / FILE
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # half a line that a crash has left
            noted = json.loads(line)
            yield (int(noted["first_step"]), int(noted["last_step"])), str(noted["reason"])


class LeftOutLog:
    """Keeps ``RUN/left_out.jsonl``, a line for every verdict; rank 0 writes.

    Args:
        run_dir: the run's folder.
        rank: of this process.
        start: the step that the run goes on from; what was noted of later ones will be noted again.
        emit: takes the warnings.

    Raises:
        StorageError: the file cannot be read or written.
    """

    def __init__(self, run_dir: Path, rank: int, start: int, emit: Emit) -> None:
        self.path, self._rank, self._emit = run_dir / FILE, rank, emit
        if rank != 0 or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # half a line that a crash has left
                if json.loads(line)["last_step"] <= start:
                    kept.append(line + "\n")
        try:
            aside = self.path.with_suffix(".partial")
            aside.write_text("".join(kept))
            aside.replace(self.path)
        except OSError as error:
            raise self._refused(error) from error

    def note(self, left_out: LeftOut, batch: Batch, metrics: Mapping[str, float]) -> str:
        """Write a verdict down. Every rank calls it.

        Args:
            left_out: what was judged.
            batch: this rank's rows of the batch that was judged.
            metrics: that step's numbers.

        Returns:
            The file.

        Raises:
            StorageError: rank 0 cannot write it; on every rank alike.
        """
        rows = [row for told in ranks.gather(list(zip(batch.sample_ids, batch.epochs, strict=True))) for row in told]
        # a number that is not finite as a word: JSON has no other name for it
        numbers = {name: value if value - value == 0 else repr(value) for name, value in metrics.items()}
        line = {
            **asdict(left_out),
            "position": batch.position,
            "metrics": numbers,
            "sample_ids": [sample for sample, _ in rows],
            "epochs": [epoch for _, epoch in rows],
        }
        ranks.on_rank_zero(lambda: self._write(line))
        if self._rank == 0:
            self._warn(left_out)
        return str(self.path)

    def _write(self, line: Mapping[str, object]) -> None:
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise self._refused(error) from error

    def _warn(self, left_out: LeftOut) -> None:
        if left_out.action == "skip":
            what = f"Step {left_out.last_step} was undone, and its batch is left out"
        elif left_out.action == "rewind":
            before = left_out.first_step - 1
            what = f"The weights are those of step {before} again, and the batches up to {left_out.last_step} left out"
        else:
            return  # the run's error tells it
        self._emit({"event": "warning", "message": f"{what}: {left_out.reason}. {self.path} names the samples."})

    def _refused(self, error: OSError) -> StorageError:
        return StorageError(
            "The list of steps that were left out cannot be written.",
            value=str(self.path),
            rule=error.strerror,
            mend="make room, or mend the storage; the same command goes on from the newest checkpoint",
        )
