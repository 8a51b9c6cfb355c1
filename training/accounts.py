"""The account of a run's data: what each step has consumed, known on every rank and kept by rank 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training import ranks, resume
from training.config import TrainConfig
from training.data.batch import Batch
from training.data.dataset import Dataset, Split
from training.data.use_digest import RowHash, Use
from training.data.use_ledger import UseLedger, UseState, kept_recipe
from training.errors import DataError, StorageError
from training.guards import LeftOut
from training.skipped import MissingRow, SkippedSamples
from training.spec import Emit, WorkerSpec

GONE = 64
"""When so many samples in a row cannot be read, batches whole, the data set is gone."""


class Accounts:
    """Adds up over the ranks what a step consumes; rank 0 writes it down.

    Args:
        spec: of this process.
        config: the recipe.
        dataset: what the run reads.
        split: of it.
        reasons: the loader's own record, sample id to why it cannot be read.
        before: what the state that the run goes on from says of its use; None for a fresh run.
        emit: takes the warnings.

    Raises:
        StorageError: rank 0 cannot write in the run's folder.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        config: TrainConfig,
        dataset: Dataset,
        split: Split,
        reasons: Mapping[int, str],
        before: Mapping[str, Any] | None,
        emit: Emit,
    ) -> None:
        self._split, self._reasons = split, reasons
        self._hash = RowHash(dataset.hash)
        self._gone = 0
        self._failure: StorageError | None = None
        self._ledger: UseLedger | None = None
        self._skipped: SkippedSamples | None = None
        if spec.rank != 0:
            return
        run_dir = Path(spec.run_dir)
        state = UseState(**before) if before else UseState()
        recipe = config.model_dump(mode="json")
        kept = kept_recipe(run_dir)
        # killed before its first checkpoint, a run may begin again with another recipe: what it did then is nothing
        anew = before is None and kept is not None and bool(resume.changed(kept.get("config", {}), recipe))
        self._ledger, wrong = UseLedger.open(run_dir, dataset.hash, state, anew=anew)
        if wrong:
            emit({"event": "warning", "message": wrong})
        self._ledger.keep_recipe({"config": recipe, "data_hash": dataset.hash, "split": split.name})
        self._skipped = SkippedSamples(run_dir, split.name, state.step, emit)

    @property
    def skipped_samples(self) -> int:
        """Samples that no rank could read; rank 0 knows."""
        return 0 if self._skipped is None else len(self._skipped)

    def commit(self, done: int, batch: Batch, left_out: LeftOut | None, asked_to_stop: bool) -> bool:
        """Account for a step that was taken; one message for all that the ranks must know of one another.

        What rank 0 cannot write is told with the next step's message, so that no step waits for a second one. Until
        then ``behind`` says so, and no checkpoint comes to be.

        Args:
            done: steps done.
            batch: this rank's rows.
            left_out: what of it is not in the weights.
            asked_to_stop: whether this rank was.

        Returns:
            Whether any rank was asked to stop.

        Raises:
            DataError: so many samples in a row cannot be read that the data set must be gone; on every rank alike.
            StorageError: rank 0 could not write in the run's folder; on every rank alike.
        """
        prefixes = self._split.records["sha256_prefix"][list(batch.sample_ids)]
        mine = self._hash.use(batch.epochs, batch.sample_ids, batch.valid, prefixes)
        asked, failed, *parts = ranks.total(asked_to_stop, self.behind, *mine.parts())
        if failed:
            ranks.on_rank_zero(self._require_written)
        use = Use.of_parts(parts)
        missing = self._missing(batch) if use.missing else []
        undone = None if left_out is None else (left_out.first_step, left_out.last_step)
        try:
            if self._ledger is not None and self._skipped is not None:
                self._ledger.commit(done, batch.position, use, [(row.sample_id, row.epoch) for row in missing], undone)
                self._skipped.add(done, missing)
        except StorageError as error:
            self._failure = error
        self._gone = 0 if use.rows else self._gone + use.missing
        if self._gone >= GONE:
            raise DataError(
                f"{self._gone} samples in a row cannot be read; the data set is gone or damaged.",
                value=missing[0].name(self._split.name),
                rule=missing[0].reason,
                mend="darkroom data show --verify compares every file with its checksum",
            )
        return bool(asked)

    @property
    def behind(self) -> bool:
        """Whether the last step is not in the account, because rank 0 cannot write."""
        return self._failure is not None

    def _require_written(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _missing(self, batch: Batch) -> list[MissingRow]:
        """The rows of all ranks that could not be read, in the order of the global batch."""
        rows = zip(batch.sample_ids, batch.epochs, batch.valid, strict=True)
        mine = [MissingRow(i, epoch, self._reasons.get(i, "")) for i, epoch, valid in rows if not valid]
        return sorted(row for told in ranks.gather(mine) for row in told)

    def state(self) -> dict[str, Any]:
        """What has been consumed so far; rank 0 knows."""
        return {} if self._ledger is None else asdict(self._ledger.state)

    def flush(self) -> None:
        """The ledger is on disk when this returns; before a checkpoint names it.

        Raises:
            StorageError: it cannot be written, or a step could not.
        """
        self._require_written()
        if self._ledger is not None:
            self._ledger.flush()

    def close(self) -> None:
        """Say what was left out, and close the files."""
        if self._ledger is not None and self._skipped is not None:
            self._skipped.close()
            self._ledger.close()
